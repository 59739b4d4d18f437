#!/bin/sh
# What int8 and int4 cost, of every model that the other works left here.
# make results WORK=quantize DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents) $(test ! -e sentiment-bert/checkpoints/last || echo sentiment-bert); do
	python "$CONFIGS/quantize.py" "$run" --out "quantize-$run"
done
