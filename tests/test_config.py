"""Knobs: what is read is what was written, and whatever is wrong is said in one line."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from diffstill.config import (
    LARGEST_CLASS,
    PRESETS,
    Params,
    PrepareConfig,
    PublishConfig,
    Section,
    json_schema,
    load_params,
    preset,
    read_json,
    render_params,
)
from diffstill.errors import DiffstillError
from pipelines.settings import load_settings

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "docs" / "params.schema.json"


def knobs(section, prefix=""):
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield f"{prefix}{name}", field
        if isinstance(value, Section):
            yield from knobs(value, f"{prefix}{name}.")


def load(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_params(path)


# --- written and read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_as_they_were_written(name, tmp_path):
    assert load(tmp_path, render_params(preset(name))) == preset(name)


@given(
    location=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1),
    classes=st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1), min_size=1, unique=True),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_value_is_read_as_it_was_written(tmp_path_factory, location, classes, fraction, seed):
    prepare = PrepareConfig(source="folder", location=location, classes=tuple(classes), test_fraction=fraction, seed=seed)
    params = Params(prepare=prepare, publish=PublishConfig(name="a"))
    assert load(tmp_path_factory.mktemp("params"), render_params(params)) == params


def test_every_knob_is_described_and_its_description_stands_in_the_file():
    rendered, described = render_params(Params()), list(knobs(Params()))
    assert len(described) > 60
    for name, field in described:
        assert field.description, name
        assert f"# {field.description}" in rendered, name


def test_labels_of_classes_are_written_as_they_are_read(tmp_path):
    params = load(tmp_path, 'pretrain: {source: folder, location: a, labels: {my-cat: "new:n02123045", "7": "281", off: mean}}')
    assert params.pretrain.labels == {"my-cat": "new:n02123045", "7": "281", "off": "mean"}
    assert load(tmp_path, render_params(params)) == params


def test_one_line_per_knob():
    values = YAML(typ="safe").load(render_params(Params()))
    assert values == json.loads(json.dumps(Params().model_dump(mode="json")))
    assert all(len(line.split("#")) <= 2 for line in render_params(Params()).splitlines())


def test_params_at_the_root_are_the_default_preset():
    assert (ROOT / "params.yaml").read_text() == render_params(preset("digits"))


def test_missing_knobs_take_the_default_and_an_empty_file_is_the_default_preset(tmp_path):
    assert load(tmp_path, "") == Params()
    assert load(tmp_path, "sample: {guidance: 2}").sample == Params().sample.model_copy(update={"guidance": 2.0})


def test_an_unknown_preset_is_refused():
    with pytest.raises(DiffstillError, match=r"preset 'imagenet' is not known; use one of digits, fashion-mnist, folder, imagewoof, .*, tiny"):
        preset("imagenet")


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Params().sample.guidance = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        Params().sample = Params().sample


def test_canonical_text_tells_settings_apart_and_ignores_how_they_were_written(tmp_path):
    one = load(tmp_path, "sample: {guidance: 2, steps: 5}").sample
    other = load(tmp_path, "sample:\n  steps: 5\n  guidance: 2.0\n").sample
    assert one.canonical() == other.canonical() != Params().sample.canonical()


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample: {guidanse: 2}", "`sample.guidanse` is not a knob; did you mean `sample.guidance`? remove it or mend its name"),
        ("samples: {}", "`samples` is not a knob"),
        ("pretrain: {vae: {channelz: [8]}}", "`pretrain.vae.channelz` is not a knob"),
        ("prepare: {side: x}", "`prepare.side` is 'x': Input should be a valid integer"),
        ("prepare: {side: 8.0}", "`prepare.side` is 8.0: Input should be a valid integer"),
        ("prepare: {side: true}", "`prepare.side` is True: Input should be a valid integer"),
        ("prepare: {flip: 1}", "`prepare.flip` is 1: Input should be a valid boolean"),
        ("prepare: {classes: [1, '2']}", "`prepare.classes` has 1 where text is expected; put it in quotes"),
        ("prepare: {location: 5}", "`prepare.location` has 5 where text is expected; put it in quotes"),
        ("finetune: {preview_every: -1}", "`finetune.preview_every` is -1: Input should be greater than or equal to 0"),
        ("publish: {gate: test-gain}", "`publish.gate` is 'test-gain': Input should be 'val-gain' or 'off'"),
        ("publish: {name: a/b}", "`publish.name` is 'a/b': String should match pattern"),
        ("publish: {name: 'a\\n'}", "`publish.name` is"),
        ("publish: {name: .a}", "`publish.name` is '.a': String should match pattern"),
        ("publish: {name: a@b}", "`publish.name` is 'a@b': String should match pattern"),
        (
            "publish: {store: bucket/sets}",
            "publish: `publish.store` is 'bucket/sets'; give s3://<bucket>/<prefix>, or null for MLflow's own artifact store",
        ),
        ("publish: {store: 's3://key:pw@bucket/sets'}", "publish.store: holds credentials or a query"),
        ("publish: {encryption: AES256}", "publish: `publish.encryption` is for `publish.store`; set that, or set encryption to null"),
        (
            "publish: {store: s3://bucket/a, encryption: AES256, kms_key: k}",
            "publish: `publish.kms_key` needs `publish.encryption: aws:kms`; set that, or set the key to null",
        ),
        ("publish: {store: s3://bucket/a, kms_key: k}", "publish: `publish.kms_key` needs `publish.encryption: aws:kms`"),
        ("publish: {store: s3://bucket/a, encryption: DES}", "`publish.encryption` is 'DES': Input should be 'AES256' or 'aws:kms'"),
        ("finetune: {max_timestep: x}", "`finetune.max_timestep` is 'x': Input should be a valid integer"),
        ("sample:", "`sample` is None: Input should be an object"),
        ("prepare: {side: 4}", "`prepare.side` is 4: Input should be greater than or equal to 8"),
        ("prepare: {channels: 2}", "`prepare.channels` is 2: Input should be 1 or 3"),
        ("prepare: {test_fraction: 1}", "`prepare.test_fraction` is 1: Input should be less than 1"),
        ("evaluate: {images_per_class: [1, 0]}", "`evaluate.images_per_class.1` is 0: Input should be greater than or equal to 1"),
        ("evaluate: {students: []}", "`evaluate.students` is []: Tuple should have at least 1 item"),
        (
            "evaluate: {protocol: short-0}",
            "protocol 'short-0' is not known; use minimax-224, minimax-256, minimax-1k, condensation-small, or short-<steps>",
        ),
        ("finetune: {policy: lru}", "`finetune.policy` is 'lru': Input should be 'redundancy', 'fifo' or 'none'"),
        ("finetune: {learning_rate: .inf}", "`finetune.learning_rate` is inf: Input should be a finite number"),
        ("sample: {guidance: .nan}", "`sample.guidance` is nan: Input should be a finite number"),
        ("sample: {seeds: [-1]}", "`sample.seeds.0` is -1: Input should be greater than or equal to 0"),
        (
            "evaluate: {images_per_class: [1, 11]}",
            "`evaluate.images_per_class` asks for 11, but `sample.images_per_class` draws 10; raise the latter",
        ),
        ("finetune: {seeds: [0, 1]}", "`finetune.seeds` has 2 entries; give 1, or one for each of the 10 `sample.seeds`"),
        ("sample: {steps: 1001}", "`sample.steps` 1001 exceeds the 1000 `pretrain.timesteps`; lower it"),
        ("sample: {images_per_class: 1000000000}", "`sample.images_per_class` is 1000000000: Input should be less than or equal to 10000"),
        ("sample: {classes: []}", "`sample.classes` is []: Tuple should have at least 1 item after validation, not 0"),
        (
            "pretrain: {dit: {heads: 1, head_dim: 5}}",
            "pretrain.dit: the width `heads` x `head_dim` = 5 must be a multiple of 4 for the position embedding; change one of them",
        ),
        ("sample: {seeds: [3, 4, 3]}", "sample.seeds: lists 3 2 times; list it once"),
        ("evaluate: {students: [a, a, a]}", "evaluate.students: lists 'a' 3 times; list it once"),
        ("pretrain: {source: folder}", "`location` goes with `source: folder` or `checkpoint`, and only with them"),
        ("pretrain: {location: here}", "`location` goes with `source: folder` or `checkpoint`, and only with them"),
        ("pretrain: {autoencoder: ema}", "are for pretrained weights, not for `source: scratch`; leave them out"),
        ("pretrain: {labels: {a: mean}}", "are for pretrained weights, not for `source: scratch`; leave them out"),
        ("pretrain: {source: checkpoint, location: DiT.pt}", "`source: checkpoint` has no autoencoder; set `autoencoder` to ema, mse or a folder"),
        ("pretrain: {source: folder, location: a, labels: {a: 3}}", "`pretrain.labels.a` has 3 where text is expected; put it in quotes"),
        ("finetune: {precision: fp8}", "`finetune.precision` is 'fp8': Input should be 'float32' or 'bf16'"),
        ("pretrain: {beta_start: 0.5}", "`beta_start` 0.5 must not exceed `beta_end` 0.02"),
        (
            "prepare: {side: 9}",
            "`pretrain.vae.channels` [16, 32] halves the side 1 times, but 9 px cannot be halved so often; "
            "use fewer widths, or make `prepare.side` a multiple of 2",
        ),
        ("prepare: {side: 12}\npretrain: {dit: {patch: 4}}", "`pretrain.dit.patch` 4 does not divide the latent side 6; use a divisor"),
        ("finetune: {balanced: true}", "`finetune.balanced` needs a batch size that is a multiple of the 10 classes, not 32"),
        ("prepare: {classes: ['0', '1', '2']}\nfinetune: {balanced: true}", "a multiple of the 3 classes, not 32"),
        (
            "sample: {images_per_class: 132}\nevaluate: {images_per_class: [132]}",
            "`evaluate.images_per_class` asks for 132, but no class of digits has more than 131 training images",
        ),
        ("evaluate: {students: [convnet-2, convnet-4]}", "student 'convnet-4' needs images of at least 16 px, these have 8 px"),
        ("evaluate: {students: [resnet-18]}", "student 'resnet-18' needs images of at least 16 px, these have 8 px"),
        ("prepare: {source: folder, location: a}", "`publish.name` is null, but images of a folder have no name of their own"),
        ("sample: [", "not valid YAML (line 1: "),
        ("sample:\n  steps: 3\n  steps: 4\n", 'not valid YAML (line 3: found duplicate key "steps"'),
        ("a: 1\n---\nb: 1\n", "not valid YAML (line 2: "),
        ("\0", "not valid YAML (unacceptable character"),
        (b"\xff\xfe", "not valid YAML ('utf-8' codec can't decode"),
        ("- 1\n- 2\n", "holds [1, 2] where sections are expected (prepare, "),
        ("digits", "holds 'digits' where sections are expected (prepare, "),
        ("prepare: {location: 2020-01-01}", "holds a value that is no number, text, list or mapping"),
        ("prepare: &itself [*itself]", "line 1: holds the alias *itself, which is not taken here"),
        ("? [1, 2]\n: 3\n", "holds a value that is no number, text, list or mapping"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, message, tmp_path):
    with pytest.raises(DiffstillError) as refusal:
        load(tmp_path, text)
    assert str(refusal.value).startswith(f"{tmp_path / 'params.yaml'}: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["{}", "{store: s3://bucket/a}", "{store: s3://bucket/a, encryption: AES256}", "{store: s3://bucket/a, encryption: aws:kms, kms_key: k}"]
)
def test_a_store_with_or_without_encryption_is_taken(text, tmp_path):
    assert load(tmp_path, f"publish: {text}").publish.store == (None if text == "{}" else "s3://bucket/a")


def test_only_the_preset_that_means_nothing_is_published_unproven():
    assert {name: preset(name).publish.gate for name in PRESETS} == dict.fromkeys(PRESETS, "val-gain") | {"tiny": "off"}


@pytest.mark.parametrize(
    "text",
    [
        "sample: {images_per_class: 132}\nevaluate: {images_per_class: [132], baselines: [full]}",
        "sample: {images_per_class: 131}\nevaluate: {images_per_class: [131]}",
        "prepare: {source: fashion-mnist, side: 28}\nevaluate: {students: [convnet-5]}",
        "prepare: {side: 9}\npretrain: {source: folder, location: a}",
        "prepare: {source: folder, location: a}\nfinetune: {balanced: true}\npublish: {name: mine}",
    ],
    ids=["no real images are drawn", "as many as there are", "padded to 32", "another generator", "classes that are not known"],
)
def test_what_may_go_together_is_taken(text, tmp_path):
    load(tmp_path, text)


def test_the_largest_class_of_the_digits_is_as_known():
    from sklearn.datasets import load_digits

    assert max(Counter(load_digits().target.tolist()).values()) == LARGEST_CLASS["digits"]


def test_all_wrong_knobs_are_named_at_once(tmp_path):
    with pytest.raises(DiffstillError, match=r"`prepare.sidee` is not a knob.*; `sample.steps` is 0: "):
        load(tmp_path, "prepare: {sidee: 8}\nsample: {steps: 0}")


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(DiffstillError, match=r"none.yaml: no such file; write one with `diffstill preset digits`"):
        load_params(tmp_path / "none.yaml")


# --- for editors --------------------------------------------------------------------------------------------------


def test_the_schema_in_docs_is_current():
    assert json.loads(SCHEMA.read_text()) == json_schema(), "run: diffstill schema > docs/params.schema.json"


UNDERSTOOD = ("type", "enum", "const", "anyOf", "minItems", "maxLength", "pattern", "items", "properties", "additionalProperties")


def faults(value, schema, whole, place="params"):  # noqa: PLR0912
    """What a JSON schema validator finds, for the keywords that occur in ours; any other keyword is an error."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    bounds = {"minimum": "__ge__", "maximum": "__le__", "exclusiveMinimum": "__gt__", "exclusiveMaximum": "__lt__"}
    for keyword, rule in schema.items():
        if keyword in bounds and isinstance(value, int | float) and not getattr(float(value), bounds[keyword])(rule):
            yield f"{place}: {value} breaks {keyword} {rule}"
        elif keyword == "type" and (not isinstance(value, kinds[rule]) or (isinstance(value, bool) and rule != "boolean")):
            yield f"{place}: {value!r} is no {rule}"
        elif (keyword == "enum" and value not in rule) or (keyword == "const" and value != rule):
            yield f"{place}: {value!r} is not {rule}"
        elif keyword == "anyOf" and all(list(faults(value, option, whole)) for option in rule):
            yield f"{place}: {value!r} fits no option"
        elif keyword == "$ref":
            yield from faults(value, whole["$defs"][rule.removeprefix("#/$defs/")], whole, place)
        elif keyword == "minItems" and isinstance(value, list) and len(value) < rule:
            yield f"{place}: {value} is too short"
        elif keyword == "maxLength" and isinstance(value, str) and len(value) > rule:
            yield f"{place}: {value!r} is too long"
        elif keyword == "pattern" and isinstance(value, str) and not re.search(rule, value):
            yield f"{place}: {value!r} does not match {rule}"
        elif keyword == "items" and isinstance(value, list):
            for item in value:
                yield from faults(item, rule, whole, place)
        elif keyword == "properties" and isinstance(value, dict):
            for name in value.keys() & rule.keys():
                yield from faults(value[name], rule[name], whole, f"{place}.{name}")
        elif keyword == "additionalProperties" and isinstance(value, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                yield from [f"{place}.{name} is unknown"] if rule is False else faults(value[name], rule, whole, f"{place}.{name}")
        else:
            assert keyword in {*bounds, *UNDERSTOOD, "$defs", "title", "description", "default"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_schema_accepts_presets(name):
    schema = json_schema()
    assert list(faults(YAML(typ="safe").load(render_params(preset(name))), schema, schema)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": {"guidanse": 2}},
        {"pretrain": {"vae": {"channelz": [8]}}},
        {"samples": {}},
        {"sample": {"steps": 0}},
        {"pretrain": {"labels": {"cat": 3}}},
        {"evaluate": {"protocol": "short-0"}},
        {"evaluate": {"students": []}},
        {"prepare": {"side": "8"}},
        {"prepare": {"channels": 2}},
        {"publish": {"name": "a/b"}},
        {"publish": {"name": "a" * 201}},
        {"publish": {"note": "a" * 1001}},
    ],
)
def test_the_schema_refuses_what_the_package_refuses(wrong, tmp_path):
    schema = json_schema()
    assert len(list(faults(wrong, schema, schema))) == 1
    with pytest.raises(DiffstillError):
        load(tmp_path, json.dumps(wrong))


@pytest.mark.parametrize("section", ["prepare", "pretrain"])
@pytest.mark.parametrize(
    "location", ["https://user:sentinel@host/data", "https://host/data?token=sentinel", "s3://user:sentinel@bucket/x", "https://sentinel@host/x"]
)
def test_a_location_holds_no_credentials(tmp_path, section, location):
    """It would be sent to clusters, logged and kept in manifests."""
    (tmp_path / "params.yaml").write_text(f"{section}: {{source: folder, location: '{location}'}}\n")
    with pytest.raises(DiffstillError, match=f"{section}.location: holds credentials or a query") as caught:
        load_params(tmp_path / "params.yaml")
    assert "sentinel" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    ["data", "s3://bucket/a", "https://host/data", "dvc+https://host/r.git?rev=main&path=a", "dvc+ssh://git@host/r.git?rev=main&path=a", "a@b?c"],
)
def test_other_locations_are_taken(tmp_path, location):
    (tmp_path / "params.yaml").write_text(f"prepare: {{source: folder, location: '{location}'}}\npublish: {{name: a}}\n")
    assert load_params(tmp_path / "params.yaml").prepare.location == location


def test_a_gate_that_is_off_is_off_for_tools_of_yaml_1_1_too():
    """They read a bare `off` as false, so it is written in quotes, and false is taken for it."""
    written = render_params(preset("tiny"))
    assert 'gate: "off"' in written
    old = YAML(typ="safe", pure=True)
    old.version = (1, 1)
    assert old.load(written)["publish"]["gate"] == "off"
    assert read_json('{"gate": false}', PublishConfig).gate == read_json('{"gate": "off"}', PublishConfig).gate == "off"
    with pytest.raises(DiffstillError, match="`gate` is True"):
        read_json('{"gate": true}', PublishConfig)


@pytest.mark.parametrize(
    "wrong",
    [
        {"store": "s3://"},
        {"store": "s3://A_B/x"},
        {"store": "/data"},
        {"encryption": "AES256"},
        {"store": "s3://bucket/x", "kms_key": "k"},
        {"name": "a "},
        {"name": ""},
        {"name": "a/b"},
    ],
    ids=str,
)
def test_what_no_version_can_be_is_refused(wrong):
    with pytest.raises(DiffstillError):
        read_json(json.dumps(wrong), PublishConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluate: {protocol: minimax-224}", r"protocol 'minimax-224' is for 224 to 1024 px, not 8; set `evaluate.protocol` to short-<steps>"),
        (
            "prepare: {source: imagenet1k, side: 256}\nevaluate: {protocol: minimax-224}",
            r"'minimax-224' is for 2 to 100 classes, not 1000",
        ),
        ("prepare: {source: imagewoof, side: 256}\nevaluate: {protocol: minimax-1k}", r"is for 101 to 1000000 classes, not 10;"),
        ("evaluate: {protocol: short-0}", r"protocol 'short-0' is not known; use minimax-224, .*short-<steps>"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused_when_the_file_is_read(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(DiffstillError, match=message):
        load_params(tmp_path / "params.yaml")


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "line"), [(BOMB, 2), ("sample: &s {steps: 3}\nevaluate: *s\n", 2), ("a: &a {b: 1}\nprepare:\n  <<: *a\n", 3), ("a: &a [*a]\n", 1)]
)
def test_aliases_are_refused_before_they_grow(tmp_path, text, line):
    """All that reads YAML reads it here: parameters, and the settings of the pipeline."""
    (tmp_path / "file.yaml").write_text(text)
    for read in (load_params, load_settings):
        started = time.monotonic()
        with pytest.raises(DiffstillError, match=rf"file.yaml: line {line}: holds the alias \*\w+, which is not taken here; write the value out"):
            read(tmp_path / "file.yaml")
        assert time.monotonic() - started < 5


def test_a_file_of_parameters_has_a_size(tmp_path):
    (tmp_path / "params.yaml").write_text("# " + "x" * 2**18)
    with pytest.raises(DiffstillError, match=r"has 262,146 bytes, above the 262,144 that are read; write one with `diffstill preset"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prepare: {classes: [1, 2, 10]}", "`prepare.classes` has 1, 2, 10 where text is expected; put them in quotes"),
        ("sample: {classes: [1.5, true, a]}", "`sample.classes` has 1.5, true where text is expected; put them in quotes"),
        ("evaluate: {students: [5]}", "`evaluate.students` has 5 where text is expected; put it in quotes"),
        ("prepare: {classes: [null, a]}", "`prepare.classes.0` is None: Input should be a valid string"),
        ("sample: {seeds: [a]}", "`sample.seeds.0` is 'a': Input should be a valid integer"),
    ],
)
def test_what_lacks_quotes_is_said_so_and_nothing_else(tmp_path, text, said):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(DiffstillError) as refusal:
        load_params(tmp_path / "params.yaml")
    assert str(refusal.value) == f"{tmp_path / 'params.yaml'}: {said}"
