.PHONY: install test lint types format accept bench bench-gate ci

install:  ## an editable install with everything development needs
	pip install -e '.[dev]'

test:  ## the whole test suite, on two cores
	pytest -n 2

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

bench:  ## every engine at every stage, recorded in benchmarks/results/, docs/performance.md written
	python -m kiop_fast.cli bench --record
	python benchmarks/report.py

bench-gate:  ## has a change lost speed against the reference? ratios of one run, no absolute times
	rm -f build/rows.jsonl
	pytest benchmarks --benchmark-only --scale small --engines reference,fast --rows build/rows.jsonl \
		-k "synthesis_step and B-256 or test_prompt_step or data_path"
	python benchmarks/regression.py build/rows.jsonl

ci:
	bash .ci/run
