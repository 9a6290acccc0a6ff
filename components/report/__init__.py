"""The component `report`."""
