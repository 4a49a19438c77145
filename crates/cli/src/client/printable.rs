//! Text from outside, made safe to print.

/// Shown where there is no value.
pub(super) const NONE: &str = "-";

/// Escapes control characters, so that the text cannot start a line of its own or control the terminal. Empty text becomes [`NONE`].
pub(super) fn printable(text: &str) -> String {
    if text.is_empty() {
        return NONE.into();
    }
    text.chars().fold(String::with_capacity(text.len()), |mut printable, c| {
        if c.is_control() {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
        printable
    })
}
