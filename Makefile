.PHONY: install test lint types format accept ci

install:  ## an editable install with everything development needs
	pip install -e '.[dev]'

test:  ## the whole test suite
	pytest

lint:
	ruff check .
	ruff format --check .

types:
	mypy

format:
	ruff check --fix .
	ruff format .

accept:  ## the demo from an empty cache, seeds 0, 1, 2: the numbers the README states
	pytest -m accept -s tests/test_acceptance.py

ci:
	bash .ci/run
