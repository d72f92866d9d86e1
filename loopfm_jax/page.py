"""Pages that need no network and no script, from the templates in `pages/`."""

from typing import Any

import jinja2
from markupsafe import Markup

from loopfm_jax import svg


def page(template: str, **values: Any) -> str:
    """The filled template, with the figures' colours for light and dark."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loopfm_jax", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light, dark = (Markup(svg.variables(dark=dark)) for dark in (False, True))
    return environment.get_template(f"{template}.html.j2").render(light=light, dark=dark, **values)
