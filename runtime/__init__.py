"""The program around the algorithm: user data, the compute engine, training, evaluation, results.

Modules in three layers; each imports only from its own layer and those above it in this list, or from the six top-level files:

    errors, files, images, image_cache, packed, class_folders, functions, tables, tasks
                                                        user data; import nothing of ours outside this layer
    distribution, optimizers, schedules, engine         maps one task's mathematics over meta-batches; used by maml.py
    all others                                          the program; used by main.py
"""
