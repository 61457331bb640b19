#!/bin/sh
# A smoke test of the grid, no ranking: fifteen methods at one budget, MiniLM on MRPC. Run from the repository's root with
# DATA_ROOT=FOLDER. Three learning rates of each are scored on the validation split with seed 0; the best then runs with
# three seeds. Thirty steps of eight examples a run, 200 test examples. Interrupted runs go on, finished ones are skipped.
set -eu
root=${RUN_ROOT:-runs/related_first_look}
short="trainer.max_steps=30 trainer.batch_size=8 trainer.precision=bf16 trainer.log_every=30 task.validation_size=200 task.test_size=200"
for method in lora dora vera nola randlora randlora_a edora gelora loramini lorta flatlora mora melora sora increlora; do
  case $method in
    gelora) rates=1e-4,3e-4,1e-3 ;;
    vera | lorta | nola) rates=3e-3,1e-2,3e-2 ;;
    *) rates=3e-4,1e-3,3e-3 ;;
  esac
  python train.py -m $short experiment=related/$method trainer.learning_rate=$rates seed=0 \
    data_root="$DATA_ROOT" run_root="$root"
  rate=$(python - "$root" "$method" <<'PYTHON'
import sys

from randlora.records import read

results = [result for result in read(sys.argv[1]) if result.method == sys.argv[2] and result.seed == 0]
print(max(results, key=lambda result: result.validation).config["trainer"]["learning_rate"])
PYTHON
)
  python train.py -m $short experiment=related/$method trainer.learning_rate="$rate" seed=0,1,2 \
    data_root="$DATA_ROOT" run_root="$root"
done
