# make demo: play, fit, encode, train a predictor and a decoder, evaluate (22 minutes on two cores); make test: lint and tests. Both set the environment up.
PYTHON ?= python3
PY = .venv/bin/python
FEATURES = --encoder doom_tiny --crop_size 48 --fps 10
RANDOM = --encoder vit_tiny --crop_size 48 --fps 10
TRAIN = --action_space 36 --crop_size 48 --fps 10 --predict change --feature_norm standardize --num_workers 0 --pred_dim 192 --pred_depth 4 --pred_heads 4 \
	--batch_size 32 --lr 2e-3 --warmup 1 --log_every 50 --resume

# the demo's training; what it depends on: make demo-spread
DEMO = --scaler demo/scaler.pkl $(TRAIN) --epochs 8 --ipe 150 --anneal 3 --val_every 2
DEMO_DATA = --data 'demo/features/train/*.tar' --val_data 'demo/features/val/*.tar'

# a decoder beside it, so that its predictions can be seen
DECODER = --crop_size 48 --fps 10 --frames_per_clip 4 --picture_size 96 --feature_norm standardize --width 96 --least_width 24 \
	--batch_size 16 --lr 2e-3 --epochs 4 --ipe 100 --warmup 1 --anneal 2 --val_clips 64 --val_every 4 --log_every 50 --num_workers 0 \
	--pixels_cache demo/pixels --resume

.PHONY: demo demo-random demo-spread demo-long demo-clip demo-probe demo-plan demo-lam demo-lora demo-transfer demo-arm play encoder encoder-arm test test-all lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(PY) -m prepare.demo --minutes 30 --out demo
	$(PY) fit_scaler.py --data 'demo/train/*.tar' --fps 10 --output demo/scaler.pkl
	$(PY) encode.py --data 'demo/train/*.tar' --out demo/features/train $(FEATURES) --phases 4
	$(PY) encode.py --data 'demo/val/*.tar' --out demo/features/val $(FEATURES)
	$(PY) train_ac.py $(DEMO_DATA) --out_dir out/demo $(DEMO)
	$(PY) train_decoder.py $(DEMO_DATA) --video 'demo/train/*.tar' 'demo/val/*.tar' --out_dir out/decoder $(DECODER)
	$(PY) eval.py --checkpoint out/demo --data 'demo/features/val/*.tar' --video 'demo/val/*.tar' --encoder doom_tiny --decoder out/decoder
	@echo 'open out/demo/report.html; watch out/demo/film.mp4; play in it with: make play'

play: .venv/installed  # play inside the demo's model in a browser, after make demo
	$(PY) play.py --checkpoint out/demo --decoder out/decoder --data 'demo/features/val/*.tar' --video 'demo/val/*.tar'

demo-spread: demo  # the demo's training with five seeds on one and two threads: how far apart do its runs end? 45 minutes and more
	$(PY) -m tests.spread --seeds 0 1 2 3 239 --threads 1 2 --out out/spread -- $(DEMO_DATA) $(DEMO)

demo-long: .venv/installed  # an hour of play, seven times the training: more than an hour on two cores
	$(PY) -m prepare.demo --minutes 60 --seed 1 --out demo-long
	$(PY) fit_scaler.py --data 'demo-long/train/*.tar' --fps 10 --output demo-long/scaler.pkl
	$(PY) encode.py --data 'demo-long/train/*.tar' --out demo-long/features/train $(FEATURES) --phases 2
	$(PY) encode.py --data 'demo-long/val/*.tar' --out demo-long/features/val $(FEATURES)
	$(PY) train_ac.py --data 'demo-long/features/train/*.tar' --val_data 'demo-long/features/val/*.tar' --scaler demo-long/scaler.pkl \
		--out_dir out/demo-long $(TRAIN) --epochs 20 --ipe 400 --anneal 8
	$(PY) eval.py --checkpoint out/demo-long --data 'demo-long/features/val/*.tar'

SHORT = --scaler demo/scaler.pkl $(TRAIN) --epochs 4 --ipe 150 --anneal 2 --val_every 4

demo-clip: demo  # what --encode clip hides: half of the demo's training, on features of whole clips and of single steps
	$(PY) encode.py --data 'demo/train/*.tar' --out demo/clip/train $(FEATURES) --encode clip --phases 2
	$(PY) encode.py --data 'demo/val/*.tar' --out demo/clip/val $(FEATURES) --encode clip
	$(PY) train_ac.py --data 'demo/clip/train/*.tar' --val_data 'demo/clip/val/*.tar' --encode clip --out_dir out/demo-clip $(SHORT)
	$(PY) train_ac.py --data 'demo/features/train/*.tar' --val_data 'demo/features/val/*.tar' --out_dir out/demo-tubelet $(SHORT)

demo-random: demo  # the demo on an encoder with random weights: what does the trained one add?
	$(PY) encode.py --data 'demo/train/*.tar' --out demo/random/train $(RANDOM) --phases 4
	$(PY) encode.py --data 'demo/val/*.tar' --out demo/random/val $(RANDOM)
	$(PY) train_ac.py --data 'demo/random/train/*.tar' --val_data 'demo/random/val/*.tar' --out_dir out/demo-random $(DEMO)
	$(PY) eval.py --checkpoint out/demo-random --data 'demo/random/val/*.tar' --video 'demo/val/*.tar'

demo-probe: demo  # what the demo's features and predictions say about actions
	$(PY) probe.py --checkpoint out/demo $(DEMO_DATA) --encoder doom_tiny \
		--label_field hotbar --lines 'demo/*/*.tar'

demo-plan: demo  # planning with what the demo taught: in recordings, and turning to a view in the game
	$(PY) plan.py --checkpoint out/demo --data 'demo/features/val/*.tar' --temperature 0.01 --iterations 1
	$(PY) -m evaluation.benchmark --checkpoint out/demo --encoder doom_tiny --tasks turn --horizon 2 --temperature 0.01 --iterations 1 --reach 1.4

encoder: .venv/installed  # an encoder like encoders/doom_tiny, from 150 minutes of play; copy the file there to ship it
	$(PY) -m prepare.demo --minutes 150 --seed 7 --out demo-encoder
	$(PY) fit_scaler.py --data 'demo-encoder/train/*.tar' --fps 10 --output demo-encoder/scaler.pkl
	$(PY) train_lewm.py --data 'demo-encoder/train/*.tar' --val_data 'demo-encoder/val/*.tar' --scaler demo-encoder/scaler.pkl \
		--fps 10 --crop_size 48 --frames_per_clip 8 --action_space 18 --epochs 30 --ipe 100 --warmup 2 --anneal 10 --batch_size 48 --idm 2 \
		--num_workers 0 --val_every 10 --val_clips 128 --log_every 50 --dtype bfloat16 --pixels_cache demo-encoder/pixels \
		--out_dir out/encoder --resume
	$(PY) -m prepare.encoder out/encoder out/encoder/doom_tiny.safetensors

encoder-arm: .venv/installed-dev  # an encoder like encoders/arm_tiny, from 80 episodes of each arm that the demo does not have
	$(PY) -m prepare.robot --episodes 80 --world a --seed 10 --out robot-encoder/a
	$(PY) -m prepare.robot --episodes 80 --world b --seed 11 --out robot-encoder/b
	$(PY) fit_scaler.py --dataset droid --data 'robot-encoder/*/*.tfrecord*' --stride 15 --frames_per_clip 4 --val_fraction 0.1 --output robot-encoder/scaler.pkl
	$(PY) train_lewm.py --dataset droid --data 'robot-encoder/*/*.tfrecord*' --scaler robot-encoder/scaler.pkl $(ROBOT_STEP) \
		--frames_per_clip 4 --batch_size 16 --num_workers 0 --epochs 16 --ipe 100 --warmup 1 --anneal 6 --lr 1e-3 --idm 2 \
		--val_every 4 --val_clips 64 --probe_clips 128 --log_every 50 --out_dir out/encoder-arm --resume
	$(PY) -m prepare.encoder out/encoder-arm out/encoder-arm/arm_tiny.safetensors

demo-lam: .venv/installed  # latent actions of nine known moves: do the codes name them? 3 minutes
	test -e demo-lam/manifest.json || $(PY) -m prepare.latents --out demo-lam --size 16 --files 40 --chunks 64
	test -e demo-lam/manifest.json || $(PY) -m prepare.manifest demo-lam --size 16
	$(PY) train_lam.py --data_dir demo-lam --out_dir out/demo-lam --embed_dim 48 --encoder_depth 2 --decoder_depth 2 --num_heads 4 \
		--patch_dim 64 --lr 2e-3 --batch_size 8 --epochs 3 --ipe 200 --val_every 3 --log_every 50 --num_workers 0 --resume
	$(PY) eval_lam.py --checkpoint out/demo-lam

# a step is 15 rows, one second: in a quarter of a second an arm moves less than its features show
ROBOT_STEP = --stride 15 --crop square --crop_size 64
ROBOT = $(ROBOT_STEP) --frames_per_clip 4 --num_workers 0 --batch_size 16 --grad_accum 1 --val_clips 64 --log_every 50 --resume
ADAPT = train_lora.py --scaler robot/b.pkl --base robot/base.pt $(ROBOT) --max_steps 400 --warmup_steps 20 --anneal_steps 200 --lr 1e-3
LORA = --lora_r 16 --dropout 0

demo-lora: .venv/installed-dev  # a predictor of one robot arm, adapted to another arm and camera: LoRA of four ranks beside full fine-tuning
	$(PY) -m prepare.robot --episodes 240 --world a --out robot/a
	$(PY) -m prepare.robot --episodes 40 --world b --seed 1 --out robot/b
	for w in a b; do $(PY) fit_scaler.py --dataset droid --data "robot/$$w/*.tfrecord*" --stride 15 --frames_per_clip 4 --val_fraction 0.1 \
		--output robot/$$w.pkl || exit 1; done
	for w in a b; do $(PY) encode.py --dataset droid --data "robot/$$w/*.tfrecord*" --out robot/features/$$w --encoder arm_tiny \
		$(ROBOT_STEP) --phases 15 || exit 1; done
	$(PY) train_lora.py --data 'robot/features/a/*.tar' --scaler robot/a.pkl --base none --full $(ROBOT) --feature_norm standardize \
		--predict change --pred_dim 192 --pred_depth 4 --pred_heads 4 --max_steps 1200 --warmup_steps 40 --anneal_steps 400 --lr 2e-3 \
		--out_dir out/robot/base --export robot/base.pt
	$(PY) $(ADAPT) --data 'robot/features/b/*.tar' --full --out_dir out/robot/full
	for r in 4 8 16 32; do $(PY) $(ADAPT) --data 'robot/features/b/*.tar' $(LORA) --lora_r $$r --out_dir out/robot/r$$r || exit 1; done
	$(PY) -m bench.lora --runs out/robot/full out/robot/r4 out/robot/r8 out/robot/r16 out/robot/r32

demo-transfer: demo-lora  # how many episodes of another arm are enough? 5, 20 and 35 of arm b, judged on five others, beside none (the base)
	for shards in 0 0-3 0-6; do $(PY) $(ADAPT) --data "robot/features/b/*-0000[$$shards]-of-*.tar" $(LORA) \
		--val_data 'robot/features/b/*-00007-of-*.tar' --out_dir out/robot/shards-$$shards || exit 1; done

demo-arm: demo-lora  # do they plan? each reaches and pushes, in closed loop: the base on its own arm, then base, LoRA and full on the other
	$(PY) plan.py --checkpoint out/robot/base --landscape 6 --maxnorm 0.2
	$(PY) -m evaluation.benchmark --checkpoint out/robot/base $(REACH)
	$(PY) -m evaluation.benchmark --checkpoint out/robot/base out/robot/r16 out/robot/full --arm b --out out/robot/benchmark-b.json $(REACH)

REACH = --encoder arm_tiny --horizon 1 --energy change --num_samples 128 --num_elites 8 --iterations 4

KERNELS = tests/test_attention.py tests/test_stats.py  # in a process of their own: Triton's interpreter is chosen at import

AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2  # as on processors without AVX-512
# files that compare results bit by bit
BITS = tests/test_first_version.py tests/test_checkpoint.py tests/test_compile.py tests/test_data.py tests/test_decoder.py tests/test_droid.py tests/test_encode.py tests/test_eval.py tests/test_faults.py \
	tests/test_kernels.py tests/test_lam.py tests/test_lewm.py tests/test_lora.py tests/test_model.py tests/test_plan.py tests/test_probe.py \
	tests/test_encoders.py tests/test_examples.py tests/test_stats.py tests/test_train.py tests/test_vjepa.py tests/test_weights.py

test: .venv/installed-dev lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile $(KERNELS)

test-all: .venv/installed-dev lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m ""
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile -m "" $(KERNELS)
	OMP_NUM_THREADS=2 $(AVX2) $(PY) -m pytest -n 2 --dist loadfile -m "" $(BITS)
	OMP_NUM_THREADS=2 $(AVX2) TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile -m "" $(KERNELS)

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv demo demo-long demo-encoder demo-lam robot robot-encoder out
