"""The one mechanism: describe, attach, run and store a change to a frozen model."""
