#!/bin/sh
# What a cut of the width costs, by each method, before any healing; of every parent that the other works left here.
# make results WORK=width DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents); do
	python "$CONFIGS/width.py" "$run" --out "width-$run"
done
