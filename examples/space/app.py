""" A page where one tries the Associative Transformer: python examples/space/app.py

Photographs of cats and dogs, with what the workspaces do, and questions about coloured shapes. Uploads are read from
memory and never written to disk.
"""
import argparse
import base64
import html
import io
import os
import random
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from huggingface_hub import ModelCard
from PIL import Image, UnidentifiedImageError

import timm
from timm.data import create_transform, resolve_model_data_config

from timm_ait.cli.explain import (
    BOTTLENECK,
    LayerMaps,
    describe,
    draw_heat,
    draw_read,
    input_picture,
    layer_maps,
    layer_name,
    read_legend,
    select_slots,
    smooth,
)
from timm_ait.cli.images import class_names, load_image, load_model
from timm_ait.cli.sheet import fit
from timm_ait.data.sort_of_clevr import ANSWERS, COLOURS, NUM_TRAIN, answer_tables, draw, encode_questions, scenes
from timm_ait.weights import weights_dir

PETS, SORT_OF_CLEVR = 'ait_vit_small_patch14_dinov2.pets', 'ait_tiny_hybrid_75.sort_of_clevr'
SAMPLES = sorted(Path(__file__).resolve().with_name('samples').glob('*.jpg'), key=lambda file: file.name.lower())
MAX_MEGABYTES = 30  # of a file

_PAPER = 'https://arxiv.org/abs/2309.12862'
_PANEL, _NUM_PANELS, _NUM_READ = 320, 5, 3
_EXPIRED = '<p role="alert">There is no picture. If there was one, your session expired: reload the page.</p>'

# of the kinds that the model was trained for
QUESTIONS = {
    'Is it a rectangle or a circle?': (0, 0),
    'Is it in the left half?': (0, 1),
    'Is it in the upper half?': (0, 2),
    'What shape is the object nearest to it?': (1, 0),
    'What shape is the object farthest from it?': (1, 1),
    'How many others have its shape?': (1, 2),
}


class Look(NamedTuple):
    """ What a model makes of one photograph: the picture it sees, its likeliest classes and maps of its layers. """
    picture: Image.Image
    breeds: Dict[str, float]
    layers: List[LayerMaps]
    note: str


# models


def credit(model: nn.Module, name: str) -> str:
    """HTML line with a shipped model's accuracy and licence, with links to card and paper."""
    card = ModelCard.load(weights_dir() / name / 'README.md').data
    parts = [
        html.escape(name),
        *(f'{result.metric_name} {result.metric_value:g} % on {result.dataset_name}' for result in card.eval_results),
        f'licence {html.escape(str(card.license))}',
        f'<a href="https://huggingface.co/{model.pretrained_cfg["hf_hub_id"]}">model card</a>',
        f'<a href="{_PAPER}">paper</a>',
    ]
    return ' · '.join(parts)


def read_photograph(data: bytes) -> Tuple[Image.Image, str]:
    """Read a photograph as `predict` does, on white where it is transparent.

    Args:
        data: An image file.

    Returns:
        The picture in RGB, and a note on what was done to it, '' if nothing.

    Raises:
        ValueError: It cannot be read; says why in a sentence.
    """
    try:
        picture = load_image(io.BytesIO(data), 'RGBA')
    except UnidentifiedImageError:
        raise ValueError('This file is not a picture that can be read here. JPEG, PNG and WebP can; a HEIC photograph '
                         'has to be saved as JPEG first.') from None
    except Exception as e:  # Pillow raises nearly anything on damaged files
        raise ValueError(f'This picture cannot be read: {str(e)[:200] or type(e).__name__}.') from e
    note = ''
    if picture.getextrema()[3][0] < 255:
        note = 'Its transparent parts are seen as white.'
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    return picture.convert('RGB'), note


class Pets:
    """ Names breeds, and shows what the workspaces do. One photograph at a time, whichever thread asks. """

    def __init__(self) -> None:
        self.model = load_model(PETS)
        self.config = resolve_model_data_config(self.model)
        self.transform = create_transform(**self.config, is_training=False)
        self.descriptions = [name.replace('_', ' ') for name in class_names(self.model)[1]]
        self.credit = credit(self.model, PETS)
        self._lock = threading.Lock()  # the analysis hooks into the model, load_image silences warnings

    def look(self, data: bytes) -> Look:
        """What the model makes of an image file; errors as in `read_photograph`."""
        with self._lock:
            photograph, note = read_photograph(data)
            image = self.transform(photograph)
            batch = image.unsqueeze(0).to(next(self.model.parameters()).device)
            with torch.inference_mode():
                probabilities, classes = self.model(batch).float().softmax(dim=-1)[0].topk(5)
            layers = layer_maps(self.model, batch, BOTTLENECK)
        breeds = {self.descriptions[i]: p for i, p in zip(classes.tolist(), probabilities.tolist())}
        return Look(fit(input_picture(image, self.config), _PANEL), breeds, layers, note)


class Shapes:
    """ Questions about six coloured shapes. """

    def __init__(self) -> None:
        self.model = timm.create_model(SORT_OF_CLEVR, pretrained=True).eval()
        self.credit = credit(self.model, SORT_OF_CLEVR)

    def picture(self, scene: int) -> Image.Image:
        """Picture of the scene of an index; each index has its own."""
        return Image.fromarray(draw(scenes(0, np.array([scene])))[0])

    def ask(self, scene: int, colour: str, question: str) -> Tuple[str, float, str]:
        """The model's answer, its probability, and the truth.

        Args:
            scene: Index of a scene.
            colour: Of the object asked about, out of `COLOURS`.
            question: Out of `QUESTIONS`.
        """
        first, (kind, subtype) = list(COLOURS).index(colour), QUESTIONS[question]
        encoded = encode_questions(*(np.array([index]) for index in (first, first, kind, subtype)))
        image = torch.from_numpy(np.asarray(self.picture(scene)).copy()).permute(2, 0, 1)[None] / 127.5 - 1.
        with torch.inference_mode():
            logits = self.model(image, question=torch.from_numpy(encoded).float())
            probability, answer = logits.softmax(dim=-1)[0].max(dim=-1)
        truth = answer_tables(scenes(0, np.array([scene])))[kind][0, first, subtype]
        return ANSWERS[answer], float(probability), ANSWERS[truth]


# pictures as HTML


def _data_url(picture: Image.Image, kind: str = 'JPEG') -> str:
    file = io.BytesIO()
    picture.save(file, kind, quality=88)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def _figure(picture: Image.Image, caption: str, below: str = '') -> str:
    return (f'<figure><figcaption>{caption}</figcaption><img src="{_data_url(picture)}" alt="{caption}">'
            f'{below}</figure>')


def look_html(look: Look) -> str:
    """The picture that the model sees, and its likeliest classes with bars."""
    bars = ''.join(
        f'<li><span>{html.escape(breed)}</span><span>{probability:.0%}</span>'
        f'<i style="width:{probability:.1%}"></i></li>'
        for breed, probability in look.breeds.items())
    note = f'<p>{look.note}</p>' if look.note else ''
    picture = f'<img src="{_data_url(look.picture)}" alt="what the model sees">'
    return f'<div class="look" role="status">{picture}<ol>{bars}</ol></div>{note}'


def slots_to_choose(layer: LayerMaps) -> List[int]:
    """Slots worth a look: those most read, then those whose heads agree most on a region."""
    slots = [slot for slot, share, _ in read_legend(layer.read)[:_NUM_READ] if share > 0.]
    return slots + [slot for slot in select_slots(layer.selected, _NUM_PANELS) if slot not in slots]


def layer_html(look: Look, layer: int, slot: Optional[int] = None) -> str:
    """Pictures and figures of one layer.

    Args:
        look: What the model made of a photograph.
        layer: Index of the layer.
        slot: Slot whose patches light up: where it is read, and where it would write. By default all.
    """
    maps = look.layers[layer]
    if slot is None:
        legend = ''.join(
            f'<span><i style="background:{colour}"></i>{slot}: {share:.0%}</span>'
            for slot, share, colour in read_legend(maps.read)[:_NUM_READ] if share > 0.)
        figures = [_figure(draw_read(look.picture, maps.read), 'slot read most', f'<div>{legend}</div>')]
    else:
        most = float(maps.read.max())
        figures = [_figure(draw_heat(look.picture, maps.read[slot] / most), f'slot {slot} is read',
                           f'<div>by weights of 0 to {most:.0%}</div>')]
    slots = select_slots(maps.selected, _NUM_PANELS)
    if slot is not None:
        slots = [slot, *(other for other in slots if other != slot)][:_NUM_PANELS]
    heat = smooth(maps.selected[slots])
    most = float(heat.max())
    figures += [
        _figure(draw_heat(look.picture, values / most), f'slot {other} would write')
        for other, values in zip(slots, heat)]
    rows = ''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in describe(maps))
    return (
        f'<h3>{layer_name(maps.name)}</h3><div class="maps">{"".join(figures)}</div><dl>{rows}</dl>'
        f'<p>A slot would write the {maps.num_kept} tokens that it selects in each of {maps.num_heads} heads; lit are '
        f'patches that up to {most:.1f} heads select, smoothed.</p>')


def answer_html(answer: str, probability: float, truth: str) -> str:
    verdict = 'right' if answer == truth else 'wrong'
    return (f'<dl class="answer"><div><dt>answer</dt><dd>{answer} <small>{probability:.0%}</small></dd></div>'
            f'<div><dt>truth</dt><dd>{truth} <small class="{verdict}">{verdict}</small></dd></div></dl>')


def shapes_html(picture: Image.Image) -> str:
    return f'<img class="shapes" src="{_data_url(picture, "PNG")}" alt="six coloured rectangles and circles">'


# page

_CSS = """
.gradio-container { width: 100%; min-width: 0; max-width: 1080px !important; margin: 0 auto; }
.app { padding: 16px min(32px, 3vw) !important; }
:root { --grey: #565b66; --green: #137333; --red: #c5221f; }
.dark { --grey: #a8adb8; --green: #7bd88f; --red: #ff8a80; }
h1 { font-weight: 600; }
.drop { display: block; padding: 20px 12px; border: 1.5px dashed var(--grey); border-radius: 8px;
    text-align: center; cursor: pointer; }
.drop:hover, .drop.over, .drop:focus-within { border-color: var(--body-text-color); }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.samples { display: grid; grid-template-columns: repeat(6, 1fr); gap: 8px; margin-top: 8px; }
.samples button { margin: 0 !important; padding: 0; border: 0; cursor: pointer; }
.samples img { display: block; width: 100%; border-radius: 4px; }
.look { display: grid; grid-template-columns: 2fr 3fr; gap: 16px; align-items: center; }
.look img { display: block; width: 100%; }
.look ol { list-style: none; margin: 0; padding: 0; }
.look li { display: grid; grid-template-columns: 1fr auto; margin: 0 0 8px; }
.look li:first-child { font-size: 20px; font-weight: 600; }
.look li i { grid-column: 1 / 3; height: 4px; margin-top: 3px; border-radius: 2px; background: #0072b2; }
#layer input[type=number] { display: none; } /* its half-typed numbers are errors */
.maps { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; }
.maps img { display: block; width: 100%; }
.maps figcaption, .maps figure div { font-size: 14px; line-height: 24px; }
.maps figure { margin: 0; }
.maps figure span { margin-right: 10px; white-space: nowrap; }
.maps i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; }
.maps figure div, .figures p, dt, .credit { color: var(--grey); }
dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px 16px; margin: 12px 0; font-size: 14px; }
dl div { display: flex; justify-content: space-between; }
dd { margin: 0; }
.answer { grid-template-columns: 1fr; font-size: 20px; }
.credit a { padding: 0; }
.right { color: var(--green); }
.wrong { color: var(--red); }
.shapes { width: 100%; max-width: 320px; image-rendering: pixelated; border: 1px solid var(--border-color-primary); }
@media (max-width: 600px) {
    .maps { grid-template-columns: repeat(2, 1fr); gap: 12px; }
    .samples { grid-template-columns: repeat(3, 1fr); }
    dl { grid-template-columns: 1fr; }
}
"""

_DROP = """
<label class="drop"><input type="file" accept="image/*">
<span>Drop a photograph of a cat or dog here, or <u>choose one</u></span></label>
<div class="samples">${value}</div>
"""

_DROP_SCRIPT = """
const send = (file) => {
  if (file.size > MAX_BYTES) {
    trigger('upload', {data: null});
    return;
  }
  const reader = new FileReader();
  reader.onload = () => trigger('upload', {data: reader.result.split(',')[1] || ''});
  reader.onerror = () => trigger('upload', {data: ''});  // a folder
  reader.readAsDataURL(file);
};
element.addEventListener('change', (event) => {
  if (event.target.files.length) send(event.target.files[0]);
  event.target.value = '';
});
element.addEventListener('click', async (event) => {
  const sample = event.target.closest('button');
  if (sample) send(await (await fetch(sample.firstChild.src)).blob());
});
for (const name of ['dragover', 'dragleave', 'drop']) {
  element.addEventListener(name, (event) => {
    event.preventDefault();
    element.querySelector('.drop').classList.toggle('over', name === 'dragover');
    if (name === 'drop' && event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
  });
}
""".replace('MAX_BYTES', str(MAX_MEGABYTES * 10 ** 6))


def samples_html() -> str:
    return ''.join(
        f'<button><img src="{_data_url(Image.open(file))}" alt="sample: {file.stem.rpartition("_")[0]}"></button>'
        for file in SAMPLES)


def page():
    """The page, a gradio.Blocks that is yet to be launched."""
    import gradio as gr  # here, so that all above runs without it

    pets, shapes = Pets(), Shapes()
    first = pets.look(SAMPLES[0].read_bytes())
    middle, question_asked = len(first.layers) // 2, 'What shape is the object nearest to it?'

    def choices(look: Optional[Look], layer: int) -> Dict[str, object]:
        slots = slots_to_choose(look.layers[layer]) if look else []
        return dict(choices=[('all', -1), *((str(slot), slot) for slot in slots)], value=-1)

    def upload(layer: int, event: gr.EventData):
        try:
            if event.data is None or len(event.data) > MAX_MEGABYTES * 10 ** 6 * 4 / 3 + 4:
                raise ValueError(f'This file is larger than {MAX_MEGABYTES} MB.')
            look = pets.look(base64.b64decode(event.data))
        except ValueError as e:
            return None, f'<p role="alert">{html.escape(str(e))}</p>', gr.update(**choices(None, layer)), ''
        return look, look_html(look), gr.update(**choices(look, layer)), layer_html(look, layer)

    def turn_to_layer(look: Optional[Look], layer: int):
        if look is None:
            return gr.skip(), _EXPIRED
        return gr.update(**choices(look, layer)), layer_html(look, layer)

    def light_up(look: Optional[Look], layer: int, slot: int):
        return _EXPIRED if look is None else layer_html(look, layer, None if slot < 0 else slot)

    def ask(scene: Optional[int], colour: str, question: str):
        return _EXPIRED if scene is None else answer_html(*shapes.ask(scene, colour, question))

    def new_scene(colour: str, question: str):
        scene = random.randrange(NUM_TRAIN, 2 ** 31)
        return scene, shapes_html(shapes.picture(scene)), ask(scene, colour, question)

    with gr.Blocks(title='Associative Transformer', analytics_enabled=False) as blocks:
        gr.Markdown('# Associative Transformer\nA vision transformer whose patches write into and read from a small '
                    'shared memory, the global workspace.')
        with gr.Tab('Cats and dogs'):
            look = gr.State()  # until the page has loaded, and again when gradio has forgotten the visitor
            with gr.Row():
                with gr.Column(min_width=240):
                    photograph = gr.HTML(samples_html(), html_template=_DROP, js_on_load=_DROP_SCRIPT)
                with gr.Column(min_width=240):
                    breeds = gr.HTML(look_html(first))
            with gr.Row():
                layer = gr.Slider(
                    0, len(first.layers) - 1, value=middle, step=1, label='layer', buttons=[], min_width=240,
                    elem_id='layer')
                slot = gr.Radio(label='slot to light up', min_width=240, elem_id='slot', **choices(first, middle))
            maps = gr.HTML(layer_html(first, middle), elem_classes='figures')
            gr.HTML(pets.credit, elem_classes='credit')
        with gr.Tab('Questions about shapes'):
            scene = gr.State()
            with gr.Row():
                with gr.Column(min_width=240):
                    picture = gr.HTML(shapes_html(shapes.picture(NUM_TRAIN)))
                    another = gr.Button('new picture')
                with gr.Column(min_width=240):
                    colour = gr.Radio(list(COLOURS), value='red', label='object', elem_id='object')
                    question = gr.Radio(list(QUESTIONS), value=question_asked, label='question', elem_id='question')
                    answer = gr.HTML(ask(NUM_TRAIN, 'red', question_asked))
            gr.HTML(shapes.credit, elem_classes='credit')

        blocks.load(lambda: (first, NUM_TRAIN), None, [look, scene], api_visibility='private')
        photograph.upload(
            upload, layer, [look, breeds, slot, maps], trigger_mode='always_last', show_progress_on=breeds,
            api_visibility='private')
        quick = dict(trigger_mode='always_last', show_progress='hidden', api_visibility='private')
        layer.input(turn_to_layer, [look, layer], [slot, maps], **quick)
        # gradio would look a forgotten visitor's slot up in the first picture's choices
        slot.input(light_up, [look, layer, slot], maps, preprocess=False, **quick)
        for choice in (colour, question):
            choice.input(ask, [scene, colour, question], answer, **quick)
        another.click(new_scene, [colour, question], [scene, picture, answer], **quick)
    return blocks


def launch_options() -> Dict[str, object]:
    """How the page is served: without fonts, history or links from elsewhere, and without uploads to disk."""
    import gradio as gr

    return dict(
        theme=gr.themes.Default(
            primary_hue='blue', neutral_hue='gray', font=['system-ui', 'sans-serif'], font_mono=['monospace']),
        css=_CSS,
        footer_links=[],
        run_history=False,
        max_file_size=1,  # photographs come with the event; gradio's own uploads would go to disk
        state_session_capacity=500,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description='A page where one tries the Associative Transformer.')
    parser.add_argument('--host', help='address to listen on, 0.0.0.0 for every network (default: GRADIO_SERVER_NAME, '
                                       'which a Space sets, else 127.0.0.1)')
    parser.add_argument('--port', type=int, help='port (default: the first free one from 7860)')
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # as fast for one picture, and lets the other cores serve
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix='timm_ait_space_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        blocks = page()
        try:
            _, url, _ = blocks.launch(**launch_options(), server_name=args.host, server_port=args.port)
        except OSError as e:
            parser.error(f'cannot listen on {args.host or "this host"}, port {args.port or "7860 or later"}: {e}')
        print(f'{url} (Ctrl-C ends it)', flush=True)
        blocks.block_thread()


if __name__ == '__main__':
    main()
