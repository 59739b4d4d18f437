#!/bin/sh
# What a cut of each other axis costs; of every parent that the other works left here.
# make results WORK=axes DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents); do
	noise=0
	test "$run" != t5 || noise=0.3 # it read its text three times
	python "$CONFIGS/axes.py" "$run" --noise "$noise" --heal 0.05,0.2 --new 0.05 --out "axes-$run"
done
if test -e gpt2/checkpoints/last; then # sharing from the first step, for as long as the parent was trained
	python "$CONFIGS/axes.py" gpt2 --heal "" --new 1 --only sharing=all --out axes-gpt2-whole
fi
