"""The suites as a package: ``pytest --pyargs kvsuite.benchmarks`` or ``python -m kvsuite bench``, no checkout needed."""
