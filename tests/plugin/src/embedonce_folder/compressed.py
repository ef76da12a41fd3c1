"""A backend whose package is an extra that the tests do not install."""

import a_codec_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
