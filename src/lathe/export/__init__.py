"""A model as a file of another program: GGUF for llama.cpp, CTranslate2's directory, an ONNX graph.

Each format is asked three things. What of an `Architecture` it cannot hold, which is read off the sizes and choices
alone (`objections`). To write the file, from the blueprint's names to its own (`write`). And to run it: the file is
opened in its own program and what it computes is compared with what the model computes (`check`). A file that
differs is not left behind.

`job.export` is the way in; `formats` lists what there is. The programs are installed apart (`pip install
lathe[export]`), and a format's module imports its own where it needs it.
"""
