import base64
import concurrent.futures
import io
import json
import os
import re
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from timm_ait.cli.explain import draw_heat, draw_read, smooth
from timm_ait.data.sort_of_clevr import ANSWERS, COLOURS, ask, scenes

SPACE = Path(__file__).parents[2] / 'examples' / 'space'
sys.path.insert(0, str(SPACE))

import app  # noqa: E402

BEAGLE, CAT = SPACE / 'samples' / 'beagle_19.jpg', SPACE / 'samples' / 'Maine_Coon_64.jpg'
HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(64)


def encode(image):
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


@pytest.fixture(scope='module')
def pets():
    return app.Pets()


@pytest.fixture(scope='module')
def shapes():
    return app.Shapes()


@pytest.fixture(scope='module')
def beagle(pets):
    return pets.look(BEAGLE.read_bytes())


def test_the_folder_is_a_space_of_the_models_that_the_page_shows():
    card = huggingface_hub.SpaceCard.load(SPACE / 'README.md').data
    assert card.sdk == 'gradio' and (SPACE / card.app_file).is_file()
    assert [name.split('/')[1] for name in card.models] == [app.PETS, app.SORT_OF_CLEVR]


class TestReadPhotograph:

    @pytest.mark.parametrize('data, message', [
        *((data, 'JPEG, PNG and WebP can; a HEIC photograph has to be saved as JPEG') for data in (HEIC, b'', b'text')),
        (BEAGLE.read_bytes()[:2000], '^This picture cannot be read: .*truncated'),
        (encode(Image.new('1', (9000, 9000))), 'cannot be read: 9000 x 9000 pixels are more than 64 million'),
    ], ids=['heic', 'empty', 'text', 'broken', 'huge'])
    def test_what_is_not_read_is_an_error_that_says_why(self, data, message):
        with pytest.raises(ValueError, match=message):
            app.read_photograph(data)

    def test_transparent_is_seen_on_white(self):
        picture, note = app.read_photograph(encode(Image.new('RGBA', (8, 8), (0, 0, 0, 0))))
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert note == 'Its transparent parts are seen as white.'


class TestPets:

    def test_name_the_five_likeliest_breeds(self, beagle):
        assert len(beagle.breeds) == 5
        assert max(beagle.breeds, key=beagle.breeds.get) == next(iter(beagle.breeds)) == 'beagle'

    def test_shows_the_pictures_of_explain(self, beagle):
        layer = beagle.layers[6]
        text = app.layer_html(beagle, 6)
        slots = [int(slot) for slot in re.findall(r'alt="slot (\d+) would write"', text)]
        heat = smooth(layer.selected[slots])
        expected = [draw_read(beagle.picture, layer.read)]
        expected += [draw_heat(beagle.picture, values / heat.max()) for values in heat]
        pictures = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)
        assert len(pictures) == len(expected) == 6
        for data, picture in zip(pictures, expected):
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
            assert np.abs(shown - np.asarray(picture).astype(int)).mean() < 4.  # JPEG

    def test_the_credit_names_accuracy_licence_card_and_paper(self, pets):
        card = huggingface_hub.ModelCard.load(app.weights_dir() / app.PETS / 'README.md').data
        assert f'top-1 {card.eval_results[0].metric_value:g} % on Oxford-IIIT Pet' in pets.credit
        assert f'licence {card.license}' in pets.credit
        assert f'https://huggingface.co/timm-ait/{app.PETS}' in pets.credit
        assert 'https://arxiv.org/abs/2309.12862' in pets.credit


class TestShapes:

    def test_truth_is_that_of_the_data_set(self, shapes):
        questions, answers = ask(0, np.arange(3), scenes(0, np.arange(3)))
        texts = {numbers: text for text, numbers in app.QUESTIONS.items()}
        for scene in range(3):
            for question, answer in zip(questions[scene, :20:3], answers[scene, :20:3]):
                text = texts[int(question[12:15].argmax()), int(question[15:].argmax())]
                colour = list(COLOURS)[question[:6].argmax()]
                assert shapes.ask(scene, colour, text)[2] == ANSWERS[answer]

    def test_most_answers_are_right(self, shapes):
        answers = [shapes.ask(scene, 'red', text) for scene in range(9800, 9810) for text in app.QUESTIONS]
        assert sum(answer == truth for answer, _, truth in answers) >= 54


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """A process that serves the page, its URL, and the files in what are its home and temporary folders."""
    pytest.importorskip('gradio')
    folder = tmp_path_factory.mktemp('space')
    environment = {key: value for key, value in os.environ.items() if not key.startswith('GRADIO_')}
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SPACE / 'app.py', '--port', str(port)], cwd=folder, stdout=subprocess.PIPE,
        env={**environment, 'TMPDIR': str(folder), 'HOME': str(folder)})
    process.stdout.readline()  # once it listens
    yield SimpleNamespace(url=f'http://127.0.0.1:{port}', files=lambda: sorted(folder.rglob('*')))
    process.terminate()
    process.wait(60)


class Visitor:
    """ Talks to the page as its script in the browser does. """

    def __init__(self, server):
        import httpx  # comes with gradio
        self.client = httpx.Client(base_url=server.url, timeout=120., trust_env=False)
        self.config = self.client.get('/config').json()
        self.session = uuid.uuid4().hex

    def trigger(self, event, inputs, elem_id=None, **event_data):
        """What the outputs of an event become."""
        components = {
            component['id'] for component in self.config['components']
            if elem_id in (None, component['props'].get('elem_id'))}
        function = next(
            dependency['id'] for dependency in self.config['dependencies']
            if any(target in components and name == event for target, name in dependency['targets']))
        self.client.post('/gradio_api/queue/join', json=dict(
            data=inputs, fn_index=function, event_data=event_data, session_hash=self.session)).raise_for_status()
        with self.client.stream('GET', '/gradio_api/queue/data', params=dict(session_hash=self.session)) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix('data:')) if line else {}
                if message.get('msg') == 'process_completed':
                    assert message['success'], message
                    return message['output']['data']

    def upload(self, data):
        _, breeds, _, maps = self.trigger('upload', [6], data=base64.b64encode(data).decode())
        return breeds, maps


class TestServer:

    @pytest.mark.parametrize('data, sentence', [
        (HEIC, 'HEIC'), (BEAGLE.read_bytes()[:2000], 'cannot be read'), (b'<b>', 'not a picture')])
    def test_a_file_that_is_not_read_gets_a_sentence_and_clears_the_page(self, server, data, sentence):
        breeds, maps = Visitor(server).upload(data)
        assert breeds.startswith('<p role="alert">') and sentence in breeds and maps == ''

    def test_ten_visitors_at_once_each_get_their_own(self, pets, server):
        colours = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
        files = [encode(Image.fromarray(colour).resize((200, 200))) for colour in colours]

        def visit(data):
            visitor = Visitor(server)
            breeds, _ = visitor.upload(data)
            return breeds, visitor.trigger('input', [None, 3], elem_id='layer')[1]

        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(visit, files))
        for data, (breeds, maps) in zip(files, answers):
            look = pets.look(data)
            assert breeds == app.look_html(look)
            assert maps == app.layer_html(look, 3)

    def test_a_visitor_whom_the_page_has_forgotten_is_told(self, server):
        assert 'reload' in Visitor(server).trigger('input', [None, 3], elem_id='layer')[1]
        assert 'reload' in Visitor(server).trigger('input', [None, 3, 17], elem_id='slot')[0]

    def test_nothing_of_an_upload_is_on_disk(self, server):
        visitor = Visitor(server)
        before = server.files()
        visitor.upload(CAT.read_bytes())
        visitor.upload(HEIC)
        assert server.files() == before

    def test_files_sent_past_the_page_are_refused(self, server):
        before = server.files()
        response = Visitor(server).client.post('/gradio_api/upload', files={'files': CAT.read_bytes()})
        assert response.status_code == 413
        assert server.files() == before


CHROMIUM, CHROMEDRIVER = '/usr/bin/chromium', '/usr/bin/chromedriver'


class Browser:

    def __init__(self, webdriver, url, folder):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        arguments = [
            'headless', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
            'disable-component-update', 'disable-sync', 'disable-dev-shm-usage', f'user-data-dir={folder}']
        for argument in [*arguments, *(['no-sandbox'] if os.geteuid() == 0 else [])]:
            options.add_argument(f'--{argument}')
        options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
        self.driver.get(url)
        self.wait_for(self.pictures)

    def all(self, selector):
        return self.driver.find_elements('css selector', selector)

    def wait_for(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait
        return WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException]).until(
            lambda _: condition())

    def wait_for_breed(self, breed):
        self.wait_for(lambda: [name.text for name in self.all('.look li span')][:1] == [breed])

    def pictures(self):
        return [image.get_attribute('src') for image in self.all('.maps img')]


@pytest.fixture
def browser(server, tmp_path):
    if not (os.path.exists(CHROMIUM) and os.path.exists(CHROMEDRIVER)):
        pytest.skip('chromium and chromium-driver are not installed')
    browser = Browser(pytest.importorskip('selenium.webdriver'), server.url, tmp_path)
    yield browser
    browser.driver.quit()


@pytest.mark.slow
class TestBrowser:

    def test_drop(self, browser):
        browser.driver.execute_script("""
            const bytes = Uint8Array.from(atob(arguments[0]), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], 'cat.jpg', {type: 'image/jpeg'}));
            document.querySelector('.drop').dispatchEvent(
                new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
        """, base64.b64encode(CAT.read_bytes()).decode())
        browser.wait_for_breed('Maine Coon')

    def test_slider(self, browser):
        before = browser.pictures()
        browser.all('#layer input[type=range]')[0].send_keys('\ue012')  # arrow to the left
        browser.wait_for(lambda: browser.all('.figures h3')[0].text == 'block 5')
        assert not set(before) & set(browser.pictures())

    def test_an_upload_is_looked_at_without_another_host_or_an_error(self, browser, server):
        browser.all('.drop input')[0].send_keys(str(CAT))
        browser.wait_for_breed('Maine Coon')
        events = [json.loads(entry['message'])['message'] for entry in browser.driver.get_log('performance')]
        urls = [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']
        own = (f'{server.url}/', 'data:', 'blob:', 'chrome')  # the last is the browser's own empty tab
        assert [url for url in urls if not url.startswith(own)] == []
        assert any(url.startswith(server.url) for url in urls)
        assert [entry for entry in browser.driver.get_log('browser') if entry['level'] == 'SEVERE'] == []
