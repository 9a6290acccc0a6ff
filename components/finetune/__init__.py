"""The component `finetune`."""
