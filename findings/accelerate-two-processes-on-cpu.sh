#!/usr/bin/env bash
# accelerate 1.15.0, transformers 5.23.0, torch 2.13.0: two processes on a CPU, by the two usual commands.
#
# Guess: two processes that train together.
# Seen:  accelerate launch --num_processes 2 --cpu: 1 process(es), world size 1
#        torchrun --nproc_per_node 2: 2 process(es), world size 1
#        torchrun --nproc_per_node 2, use_cpu=True: 2 process(es), world size 2
# The first runs one process without a word. The second runs two trainings that know nothing of each other, on the same rows and
# into the same folder, unless TrainingArguments(use_cpu=True) is given, also on a machine without any GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/script.py" <<'PY'
import os
import sys

from transformers import TrainingArguments

arguments = TrainingArguments(sys.argv[1] + "/out", use_cpu=True if "use_cpu" in sys.argv else False, report_to=[])
with open(f"{sys.argv[1]}/process-{os.getpid()}", "w") as file:
    file.write(str(arguments.world_size))
PY
seen() {  # what the processes left behind, then nothing
  "${@:2}" > "$folder/log" 2>&1
  line="$1: $(ls "$folder"/process-* | wc -l) process(es), world size $(cat "$folder"/process-* | head -c 1)"
  rm "$folder"/process-*
  echo "$line"
}
bin="$folder/venv/bin"
export CUDA_VISIBLE_DEVICES= HF_HOME="$folder"
one=$(seen "accelerate launch --num_processes 2 --cpu" "$bin/accelerate" launch --num_processes 2 --cpu "$folder/script.py" "$folder")
ports=(--master_addr 127.0.0.1 --master_port 29741)
two=$(seen "torchrun --nproc_per_node 2" "$bin/torchrun" --nproc_per_node 2 "${ports[@]}" "$folder/script.py" "$folder")
three=$(seen "torchrun --nproc_per_node 2, use_cpu=True" "$bin/torchrun" --nproc_per_node 2 "${ports[@]}" "$folder/script.py" "$folder" use_cpu)
printf '%s\n' "$one" "$two" "$three"
[ "$one" = "accelerate launch --num_processes 2 --cpu: 1 process(es), world size 1" ]
[ "$two" = "torchrun --nproc_per_node 2: 2 process(es), world size 1" ]
[ "$three" = "torchrun --nproc_per_node 2, use_cpu=True: 2 process(es), world size 2" ]
