"""The tasks of `--task`: small templates over a row's columns, each in a module of its own."""
