#!/bin/sh
# Half of a BERT shape's parameters on Korean reviews: the budget's plan beside every single axis.
# make results WORK=budget DATA=FOLDER
set -eu
text=$DATA/reviews-ko.text.txt.gz valid=$DATA/reviews-ko.valid.tsv.gz
test -d tok-reviews || lathe tokenizer tok-reviews --from "$text" vocab_size=16384 convention=bert
lathe train "$CONFIGS/bert.yaml" data.train="$text" data.validation="$valid" --resume
python "$CONFIGS/budget.py" bert/checkpoints/last --calibrate "$text" --data "$valid" data.field=document \
	calibrate.tokens=4096 data.tokens=6000
