//! All that commands print: standard output, messages on standard error, lines for a
//! terminal.
//!
//! Invariants: no other place prints (clippy's `disallowed-macros`); what is printed is
//! harmless ([`escape`]), but for the few sequences that this writes itself; a standard
//! output that takes nothing ends the command: quietly when its reader has gone, else with
//! an error. Standard error is written as far as it takes something: there is nobody left
//! to be told.
//!
//! Does not: touch the streams of a command that runs in a guest (`session`): they are the
//! command's own bytes, as with ssh.

use std::io::{self, ErrorKind, IsTerminal, Write};

use serde_json::Value;

use super::escape;
use super::output::{self, Failure, FAILED};
use crate::sys::streams::was_closed;

/// What printing gives.
pub type Printed = Result<(), Failure>;

/// Prints text of any number of lines, as it is.
///
/// # Errors
/// As [`line`].
pub fn block(text: impl AsRef<str>) -> Printed {
    write(&escape::block(text.as_ref()))
}

/// Prints one line.
///
/// # Errors
/// When standard output cannot be written: [`Failure::quiet`] when nobody reads it.
pub fn line(text: impl AsRef<str>) -> Printed {
    write(&format!("{}\n", escape::line(text.as_ref())))
}

/// Prints JSON, as one line.
///
/// # Errors
/// As [`line`].
pub fn json(value: &Value) -> Printed {
    write(&format!("{}\n", escape::json(&value.to_string())))
}

/// Prints rows in columns.
///
/// # Errors
/// As [`line`].
pub fn table(rows: &[Vec<String>]) -> Printed {
    write(&output::table(rows))
}

/// Clears a terminal's screen; nothing for anything else.
///
/// # Errors
/// As [`line`].
pub fn clear_screen() -> Printed {
    match io::stdout().is_terminal() {
        true => write("\x1b[H\x1b[2J"),
        false => Ok(()),
    }
}

/// Prints help, or the version, which are ours and may be bold.
///
/// # Errors
/// As [`line`].
pub fn help(text: &clap::Error) -> Printed {
    written(text.print().and_then(|()| io::stdout().flush()))
}

fn write(text: &str) -> Printed {
    let mut out = io::stdout().lock();
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

fn written(done: io::Result<()>) -> Printed {
    // What was written then went to /dev/null.
    if was_closed(1) {
        return Err(Failure::new(FAILED, "write to standard output: it is closed"));
    }
    done.map_err(|e| match e.kind() {
        ErrorKind::BrokenPipe => Failure::quiet(),
        _ => Failure::new(FAILED, format!("write to standard output: {e}")),
    })
}

/// Longest message, in characters: a guest's agent may say megabytes.
const LONGEST: usize = 16 * 1024;

fn cut(text: &str) -> &str {
    text.char_indices().nth(LONGEST).map_or(text, |(at, _)| &text[..at])
}

/// Tells something on standard error, in one line.
pub fn message(text: impl AsRef<str>) {
    to_stderr(&format!("vmcache: {}\n", escape::line(cut(text.as_ref()))));
}

/// Tells what is wrong with the command line, and how it is used.
pub fn usage(text: impl AsRef<str>) {
    let mut text = cut(text.as_ref()).to_string();
    // Its own lines help to read it; those of what it quotes are not its own.
    for word in std::env::args_os().skip(1) {
        let word = word.to_string_lossy();
        if word.contains(['\n', '\r']) && !word.trim().is_empty() {
            text = text.replace(&*word, &escape::line(&word));
        }
    }
    to_stderr(&escape::block(&text));
}

/// The same for a text whose own lines help to read it: what QEMU or a guest's console
/// wrote, a place in a file. Lines that follow are set in, so that none looks like one of
/// ours.
pub fn message_in_lines(text: impl AsRef<str>) {
    let text = escape::block(cut(text.as_ref()).trim_end());
    to_stderr(&format!("vmcache: {}\n", text.replace('\n', "\n    ")));
}

/// Tells one line without a name before it.
pub fn bare_message(text: impl AsRef<str>) {
    to_stderr(&format!("{}\n", escape::line(text.as_ref())));
}

/// Shows a line on a terminal in the place of the last one; an empty one takes it away.
pub fn progress(text: &str) {
    to_stderr(&format!("\r\x1b[K{}", escape::line(text)));
}

/// One write: whole lines in a file, and quick.
fn to_stderr(text: &str) {
    // A closed stderr is no reason to stop.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}
