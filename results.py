"""What an evaluation leaves behind: a table to read, and the csv and pickle files of the reference."""
import csv
import pickle

import numpy as np


def statistics(values):
    """Mean, standard deviation and half-width of the 95% interval of the mean over tasks.

    Args:
        values: [tasks, columns].

    Returns:
        Three arrays [columns]; the standard deviation divides by the number of tasks, the last is 1.96 * std / sqrt(tasks).
    """
    std = values.std(axis=0)
    return values.mean(axis=0), std, 1.96 * std / np.sqrt(len(values))


def table(values, score):
    """Text: for each number of updates the mean and its 95% interval; score is 'accuracy' (in percent) or 'loss'."""
    mean, _, ci95 = statistics(values)
    scale, digits, title = (100, 2, 'accuracy in %') if score == 'accuracy' else (1, 4, 'mean squared error')
    lines = [f'  updates  {title}, with its 95% interval']
    for updates, (centre, half) in enumerate(zip(mean * scale, ci95 * scale)):
        note = '   support rows, before adaptation' if updates == 0 else ''
        lines.append(f'  {updates:7d}  {centre:8.{digits}f} ± {half:.{digits}f}{note}')
    return '\n'.join(lines)


def write(prefix, values):
    """Writes <prefix>.csv (header update0,update1,..., rows mean, std, ci95) and <prefix>.pkl ({'mses': values})."""
    with open(prefix + '.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow([f'update{updates}' for updates in range(values.shape[1])])
        writer.writerows(statistics(values))
    with open(prefix + '.pkl', 'wb') as file:
        pickle.dump({'mses': values}, file)
