"""A backend that needs a package of an extra, which the tests do not install."""

import a_codec_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
