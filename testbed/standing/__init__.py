"""Sessions that stand (`ballast up` to `down`): the keeper's process, and what can be done with it by hand."""
