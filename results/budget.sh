#!/bin/sh
# Half of the parameters: the budget's plan beside every single axis; of every parent that the other works left
# here and that was trained on plain text.
# make results WORK=budget DATA=FOLDER
set -eu
. "$CONFIGS/parents.inc"
text=$DATA/reviews-ko.text.txt.gz valid=$DATA/reviews-ko.valid.tsv.gz
for run in $(parents); do
	if test "$run" = t5; then
		echo "budget: t5 is left out: it was trained on pairs, and a budget is measured on plain text" >&2
		continue
	fi
	python "$CONFIGS/budget.py" "$run/checkpoints/last" --calibrate "$text" --data "$valid" data.field=document \
		calibrate.tokens=24000 data.tokens=20000 > "budget-$run.md"
	cat "budget-$run.md"
done
