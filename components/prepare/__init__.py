"""The component `prepare`."""
