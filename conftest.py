"""The kvsuite plugin itself loads through its entry point only."""

pytest_plugins = ["pytester"]
