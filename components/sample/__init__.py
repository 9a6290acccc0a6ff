"""The component `sample`."""
