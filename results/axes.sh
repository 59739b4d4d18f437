#!/bin/sh
# What a cut of each other axis costs; of every parent that the other works left here.
# make results WORK=axes DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents); do
	python "$CONFIGS/axes.py" "$run" --out "axes-$run"
done
