#!/bin/sh
# Cut and healed, beside trained from nothing; of every parent that the other works left here.
# make results WORK=heal DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
for run in $(parents); do
	python "$CONFIGS/heal.py" "$run" --whole --out "heal-$run"
done
if test -e t5/checkpoints/last; then # the sizes that a budget of half its parameters found (WORK=budget)
	python "$CONFIGS/heal.py" t5 --shares "" --sizes d_ff=352,d_model=136 --noise 0.3 --out heal-t5-plan
fi
