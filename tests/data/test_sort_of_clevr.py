""" Sort-of-CLEVR against independent computations from its pixels. """
from collections import Counter

import numpy as np
import pytest

from timm_ait.data import SortOfClevr
from timm_ait.data.sort_of_clevr import ANSWERS, COLOURS, KINDS, ask, draw, scenes, write_sort_of_clevr


@pytest.fixture
def folder(tmp_path):
    write_sort_of_clevr(tmp_path, 0, 30, 12)
    return tmp_path


def objects_in(image):
    """Centre and shape of each colour, from the pixels."""
    found = {}
    for name, colour in COLOURS.items():
        y, x = np.nonzero((image == colour).all(-1))
        found[name] = ((x.min() + x.max()) / 2, (y.min() + y.max()) / 2), 'rectangle' if len(x) == 121 else 'circle'
        assert x.max() - x.min() == 10 and y.max() - y.min() == 10  # whole, so nothing lies over it
    return found


def answer_from_pixels(image, question):
    """Answer a question from the image alone, by other means than the generator's."""
    found = objects_in(image)
    names = list(COLOURS)
    kind, subtype = KINDS[int(np.flatnonzero(question[12:15])[0])], int(np.flatnonzero(question[15:])[0])
    first = names[int(np.flatnonzero(question[:6])[0])]
    (x, y), shape = found[first]
    others = {name: thing for name, thing in found.items() if name != first}
    if kind == 'non_relational':
        return [shape, 'yes' if x < 37 else 'no', 'yes' if y < 37 else 'no'][subtype]
    if kind == 'relational':
        by_distance = sorted(others.values(), key=lambda thing: np.hypot(thing[0][0] - x, thing[0][1] - y))
        same = sum(thing[1] == shape for thing in others.values())
        return [by_distance[0][1], by_distance[-1][1], str(same)][subtype]
    second = names[int(np.flatnonzero(question[6:12])[0])]
    a, b = np.array(found[first][0]), np.array(found[second][0])
    rest = [np.array(thing[0]) for name, thing in found.items() if name not in (first, second)]
    if subtype == 0:
        return str(sum(bool(((p - a) * (p - b) <= 0).all()) for p in rest))
    if subtype == 1:
        direction = (b - a) / np.linalg.norm(b - a)
        distances = [np.linalg.norm((p - a) - ((p - a) @ direction) * direction) for p in rest]
        return 'yes' if min(distances) <= 5 + 1e-9 else 'no'

    def angle(at, to, other):
        u, v = to - at, other - at
        return np.degrees(np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1)))

    return str(sum(max(angle(a, b, p), angle(b, a, p), angle(p, a, b)) > 90 + 1e-6 for p in rest))


class TestSortOfClevr:

    def test_answers_agree_with_the_pixels(self):
        seed, indices = 5, np.arange(40)
        objects = scenes(seed, indices)
        images = draw(objects)
        questions, answers = ask(seed, indices, objects)
        asked = Counter()
        for image, image_questions, image_answers in zip(images, questions, answers):
            for question, answer in zip(image_questions, image_answers):
                assert ANSWERS[answer] == answer_from_pixels(image, question), question
                asked[tuple(question[12:])] += 1
        assert len(asked) == 9 and min(asked.values()) > 80

    def test_a_sample_depends_on_seed_and_index_alone(self):
        together, alone = scenes(2, np.array([9, 4])), scenes(2, np.array([4]))
        assert np.array_equal(together.centres[1], alone.centres[0])
        assert np.array_equal(together.circles[1], alone.circles[0])
        questions, answers = ask(2, np.array([9, 4]), together)
        other_questions, other_answers = ask(2, np.array([4]), alone)
        assert np.array_equal(questions[1], other_questions[0]) and np.array_equal(answers[1], other_answers[0])
        assert not np.array_equal(scenes(3, np.array([4])).centres, alone.centres)

    def test_the_loader_gives_what_was_generated(self, folder):
        indices = np.r_[:30, 9800:9812]  # validation after the default number of training images
        objects = scenes(0, indices)
        images = draw(objects)
        questions, answers = ask(0, indices, objects)
        for split, first, size in (('train', 0, 30), ('validation', 30, 12)):
            data = SortOfClevr(folder, split)
            assert len(data) == size * 30
            for item in (0, 31, len(data) - 1):
                image, question, answer = data[item]
                i, j = first + item // 30, item % 30
                assert np.array_equal(image, images[i]) and image.dtype == np.uint8
                assert np.array_equal(question, questions[i, j]) and question.dtype == np.float32
                assert answer == answers[i, j]

    def test_the_loader_takes_kinds(self, folder):
        data = SortOfClevr(folder, 'validation', ['relational'])
        assert len(data) == 120
        assert {int(data[i][1][12:15].argmax()) for i in range(len(data))} == {1}

    @pytest.mark.parametrize('kinds', [[], ['unary'], ['relational', 'x']])
    def test_unknown_kinds_are_named(self, tmp_path, kinds):
        with pytest.raises(ValueError, match='kinds must be'):
            SortOfClevr(tmp_path, kinds=kinds)

    def test_a_missing_data_set_says_how_to_make_it(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='python -m timm_ait data sort-of-clevr'):
            SortOfClevr(tmp_path)

    @pytest.mark.parametrize('size', [0, 2000])
    def test_a_damaged_file_is_named(self, folder, tmp_path, size):
        (tmp_path / 'train.npz').write_bytes((folder / 'train.npz').read_bytes()[:size])
        with pytest.raises(OSError, match='train.npz cannot be read; if it is damaged'):
            SortOfClevr(tmp_path)
