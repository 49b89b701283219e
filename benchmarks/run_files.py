"""What the scripts share that train and evaluate the runs in logs/."""
TIMES = 'training_time.json'    # {machine: {'seconds', 'iterations'} of training}


def missing_classes(request, split: str) -> str:
    """'', or why a split's classes of images cannot be listed, as where the data are not prepared; reads no image.

    Args:
        request: a runtime.cli.request.Request.
    """
    from runtime.cli.run_data import source_and_tasks
    from runtime.system.errors import UserError
    try:
        source, tasks = source_and_tasks(request)
        if source.image_shape:
            source.folders(tasks.data_path).names(split)
    except UserError as error:
        return str(error)
    return ''
