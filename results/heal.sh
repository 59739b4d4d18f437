#!/bin/sh
# Cut and healed, beside trained from nothing; of every parent that the other works left here.
# make results WORK=heal DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents); do
	python "$CONFIGS/heal.py" "$run" --whole --out "heal-$run"
done
