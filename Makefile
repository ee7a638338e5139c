# make demo: play, fit, encode, train, evaluate (under 8 minutes on two cores); make test: lint and tests. Both set the environment up.
PYTHON ?= python3
PY = .venv/bin/python
FEATURES = --encoder vit_tiny --crop_size 32 --fps 10
TRAIN = --scaler demo/scaler.pkl --action_space 36 --crop_size 32 --fps 10 --feature_norm standardize --loss_exp 2 --num_workers 0 \
	--pred_dim 192 --pred_depth 4 --pred_heads 4 --batch_size 32 --lr 2e-3

.PHONY: demo demo-long demo-clip test test-all lint clean

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(PY) -m prepare.demo --minutes 10 --out demo
	$(PY) fit_scaler.py --data 'demo/train/*.tar' --fps 10 --output demo/scaler.pkl
	$(PY) encode.py --data 'demo/train/*.tar' --out demo/features/train $(FEATURES) --phases 2
	$(PY) encode.py --data 'demo/val/*.tar' --out demo/features/val $(FEATURES)
	$(PY) train_ac.py --data 'demo/features/train/*.tar' --val_data 'demo/features/val/*.tar' --out_dir out/demo --resume $(TRAIN) \
		--epochs 8 --ipe 150 --warmup 1 --anneal 3 --val_every 2 --log_every 50
	$(PY) eval.py --checkpoint out/demo --data 'demo/features/val/*.tar'

test: .venv/installed lint
	$(PY) -m pytest

test-all: .venv/installed lint
	$(PY) -m pytest -m ""

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv demo out
