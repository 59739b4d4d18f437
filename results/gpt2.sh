#!/bin/sh
# A GPT-2 shape on the text of the work language, with its tokenizer: a parent for the works that cut models.
# make results WORK=gpt2 DATA=FOLDER
set -eu
reviews=$DATA/reviews-ko.text.txt.gz peps=$DATA/peps-en.train.jsonl.gz
test -d tok-mixed ||
	lathe tokenizer tok-mixed --from "$reviews" --from "$peps" vocab_size=8000 convention=llama
lathe train "$CONFIGS/gpt2.yaml" --resume data.train="[$reviews,$peps]" \
	data.validation="$DATA/reviews-ko.valid.tsv.gz" data.validation_fields.text=document
