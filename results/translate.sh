#!/bin/sh
# One T5 for three tasks: English to Korean, Korean to English, and answers in Korean. First it learns to look.
# make results WORK=translate DATA=FOLDER
set -eu
docs=$DATA/docs-en-ko.train.jsonl.gz docs_valid=$DATA/docs-en-ko.valid.jsonl.gz
chat=$DATA/chat-ko.train.jsonl.gz chat_valid=$DATA/chat-ko.valid.jsonl.gz
test -d tok-pairs ||
	lathe tokenizer tok-pairs --from "$docs" --column en --column ko vocab_size=8000 convention=t5
lathe train "$CONFIGS/t5-copy.yaml" --resume \
	data.tasks.korean.train="$docs" data.tasks.korean.validation="$docs_valid" \
	data.tasks.english.train="$docs" data.tasks.english.validation="$docs_valid"
lathe train "$CONFIGS/t5.yaml" --resume \
	data.tasks.korean.train="$docs" data.tasks.korean.validation="$docs_valid" \
	data.tasks.english.train="$docs" data.tasks.english.validation="$docs_valid" \
	data.tasks.chat.train="$chat" data.tasks.chat.validation="$chat_valid"
lathe evaluate t5/checkpoints/best --run t5 generate.num_beams=4 --outputs t5-outputs.jsonl --json
