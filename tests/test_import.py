""" What `import timm_ait` loads. """
import subprocess
import sys


def loaded_by(code):
    result = subprocess.run(
        [sys.executable, '-c', f'{code}; import sys; print(*sys.modules, sep="\\n")'],
        check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def test_nothing_of_the_command_line_that_timm_does_not_load():
    added = loaded_by('import timm, timm_ait') - loaded_by('import timm')
    assert 'timm_ait' in added
    assert not [name for name in added if name.split('.')[0] in ('PIL', 'argparse', 'tqdm')]
    assert not [name for name in added if name.startswith(('timm_ait.cli', 'timm_ait.__main__'))]
