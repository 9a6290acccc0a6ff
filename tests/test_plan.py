"""The chain on paper: what each step takes is made before it, once."""

import pytest

from diffstill.config import PRESETS, Params, preset
from diffstill.plan import STAGES, chain, score_names


def places(where) -> set[str]:
    return {where} if isinstance(where, str) else set(where)


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_takes_what_an_earlier_one_made(name):
    made: set[str] = set()
    for step in chain(preset(name)):
        output = STAGES[step.stage].output
        taken = set().union(*(places(where) for given, where in step.paths.items() if given != output))
        assert taken <= made, step.name
        assert not places(step.paths[output]) & made, step.name
        made |= places(step.paths[output])


def test_a_step_has_the_places_of_its_stage(tmp_path):
    for step in chain(Params()):
        stage = STAGES[step.stage]
        assert {*stage.inputs, *stage.many, stage.output} <= set(step.paths) <= {*stage.inputs, *stage.many, *stage.optional, stage.output}
        assert step.output(tmp_path) == tmp_path / step.paths[stage.output]


def test_a_report_gathers_all_scores_of_all_students():
    params = Params()
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"students": ("convnet-2", "convnet-1")})})
    steps = {step.name: step for step in chain(params)}
    written = {step.paths["scores"] for step in steps.values() if step.stage == "evaluate"}
    assert set(steps["report"].paths["scores"]) == written == set(score_names(("convnet-2", "convnet-1")))
    assert len(written) == 6
