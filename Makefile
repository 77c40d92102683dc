.PHONY: setup lint type test cov build

setup:  ## install what was tested together, and the hooks that run before a commit
	pip install -c constraints.txt -e ".[dev]"
	pre-commit install

lint:  ## style and layers
	ruff check .
	ruff format --check .
	lint-imports

type:
	mypy

test:  ## about a minute; make test MARKS=slow for the long ones
	pytest $(if $(MARKS),-m "$(MARKS)")

cov:
	pytest --cov --cov-report=term-missing

build:  ## sdist and wheel into dist/
	python -m build
