"""The program around the algorithm, in six packages; each imports only from those above it in this list (tests/test_structure.py).

    system      errors, files, console, interruptions, progress
    datasets    tasks, images, tables, class folders: what data_generator.py draws from
    compute     maps one task's mathematics over meta-batches, and over devices; used by maml.py
    cli         flags, methods, and what the command line asks for
    results     statistics, results.json, comparisons and figures
    jobs        training, evaluation, prediction; checkpoints
"""
