"""The command line: parse the words, call the library, print the answer. Nothing is decided here."""
