# The targets build and use .venv. PYTHON selects the interpreter of an existing environment instead:
#   make test PYTHON=/home/anaconda3/envs/lit/bin/python
PYTHON ?= $(CURDIR)/.venv/bin/python
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEMO_OUTPUT := output/lit-digits/default
DETECTOR := retinanet_lit_digit_scenes
SEGMENTOR := fpn_lit_digit_scenes

.DEFAULT_GOAL := help
.PHONY: help env env-mm env-slow demo demo-detection demo-segmentation bench paper test test-slow test-gpu lint format clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | awk -F '\t' '{printf "make %-16s %s\n", $$1, $$2}'

env: ## build or update the environment, with packages for tests and demos
ifeq ($(origin PYTHON),file)
	@bash setup_env.sh --dev
endif

env-mm: ## the same with mmcv, mmdetection and mmsegmentation for detection and segmentation
ifeq ($(origin PYTHON),file)
	@bash setup_env.sh --dev --mm
endif

env-slow: # the same with Chromium for the tests of the HTML viewer
ifeq ($(origin PYTHON),file)
	@bash setup_env.sh --dev --mm --browser
endif

demo: env ## train a small LIT on scanned digits, evaluate it, visualize DTM's offsets
	"$(PYTHON)" demo/digits.py
	cd classification && "$(PYTHON)" main.py --cfg configs/lit-digits.yaml
	cd classification && "$(PYTHON)" main.py --cfg configs/lit-digits.yaml --eval --resume $(DEMO_OUTPUT)/latest.pth
	cd classification && "$(PYTHON)" visualize_offset.py --resume $(DEMO_OUTPUT)/latest.pth \
	    --vis_image $$(find ../data/digits/val/8 -name "*.png" | sort | head -n 1) --html $(DEMO_OUTPUT)/offsets.html
	@echo "Checkpoints, log, TensorBoard events and offsets.html: classification/$(DEMO_OUTPUT)"

demo-detection: env-mm ## train a small RetinaNet on scenes of digits, evaluate it, draw its detections
	"$(PYTHON)" -m demo.digit_scenes
	cd detection && "$(PYTHON)" tools/train.py configs/demo/$(DETECTOR).py --overwrite
	cd detection && "$(PYTHON)" tools/test.py configs/demo/$(DETECTOR).py $$(cat work_dirs/$(DETECTOR)/last_checkpoint)
	cd detection && "$(PYTHON)" tools/detect.py ../data/digit_scenes/images/val --config configs/demo/$(DETECTOR).py \
	    --checkpoint $$(cat work_dirs/$(DETECTOR)/last_checkpoint) --out-dir outputs/$(DETECTOR)
	@echo "Checkpoints and logs: detection/work_dirs/$(DETECTOR); images: detection/outputs/$(DETECTOR)"

demo-segmentation: env-mm ## train a small Semantic FPN on the same scenes, evaluate it, draw its masks
	"$(PYTHON)" -m demo.digit_scenes
	cd segmentation && "$(PYTHON)" tools/train.py configs/demo/$(SEGMENTOR).py --overwrite
	cd segmentation && "$(PYTHON)" tools/test.py configs/demo/$(SEGMENTOR).py $$(cat work_dirs/$(SEGMENTOR)/last_checkpoint)
	cd segmentation && "$(PYTHON)" tools/segment.py ../data/digit_scenes/images/val --config configs/demo/$(SEGMENTOR).py \
	    --checkpoint $$(cat work_dirs/$(SEGMENTOR)/last_checkpoint) --out-dir outputs/$(SEGMENTOR)
	@echo "Checkpoints and logs: segmentation/work_dirs/$(SEGMENTOR); images: segmentation/outputs/$(SEGMENTOR)"

bench: env ## measure the speed of LIT and other models (docs/performance.md); half an hour on two cores
	"$(PYTHON)" tools/benchmark.py --output outputs/benchmark

paper: env ## print the tables of the CIFAR-10 study (experiments/cifar10), with speeds of this machine
	"$(PYTHON)" -m experiments.cifar10.table

test: env-mm lint ## check the style, then run the test suite
	"$(PYTHON)" $(PYTEST)

test-slow: env-slow ## run the slow tests
	"$(PYTHON)" $(PYTEST) -m slow

test-gpu: env ## run only the tests that need a GPU
	"$(PYTHON)" -m pytest tests/gpu

lint: env ## check style, formatting, language, links, spelling and types
	"$(PYTHON)" -m ruff check
	"$(PYTHON)" -m ruff format --check
	"$(PYTHON)" -m tools.check_language
	"$(PYTHON)" -m tools.check_links
	"$(PYTHON)" -m codespell_lib
	"$(PYTHON)" -m pyrefly check --python-interpreter-path "$(PYTHON)"

format: env ## fix style and formatting where ruff can
	"$(PYTHON)" -m ruff check --fix
	"$(PYTHON)" -m ruff format

clean: ## remove caches and build products; keep environment, data and results
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
