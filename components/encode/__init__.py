"""The component `encode`."""
