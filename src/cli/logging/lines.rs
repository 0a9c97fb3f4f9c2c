//! How a message is written for syslog: in its classic form and in its newer one.
//!
//! Invariant: a message is one line of at most [`LONGEST`] bytes, whatever its text.
//!
//! Sources: RFC 3164, section 4.1; RFC 5424, section 6.

use std::fmt::Write as _;
use std::io::Write;
use std::time::SystemTime;

use log::kv::{self, Key, Value, VisitSource};
use log::Record;
use syslog::{Facility, LogFormat, Severity};

use crate::cli::escape;
use crate::config::logging::Form;
use crate::sys::clock::{local, Moment};

/// Longest text of a message, in bytes: what QEMU and a guest wrote last fits.
pub const LONGEST: usize = 8 * 1024;
/// The element of our structured data. Its number is that which is set aside for
/// documentation (RFC 5612): we have none of our own.
pub const ELEMENT: &str = "vmcache@32473";
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// A message: an event's name, its fields, its text.
#[derive(Debug, Default)]
pub struct Line {
    /// The event; none for a detail.
    pub event: Option<String>,
    /// Names and values.
    pub fields: Vec<(String, String)>,
    /// The text, one line.
    pub text: String,
}

impl Line {
    /// Of what was logged.
    pub fn of(record: &Record<'_>) -> Line {
        let mut line = Line { text: record.args().to_string(), ..Line::default() };
        // Visiting memory does not fail.
        let _ = record.key_values().visit(&mut line);
        line.text = one_line(&line.text);
        line
    }

    /// The text with its event before it.
    pub fn told(&self) -> String {
        match &self.event {
            Some(event) => format!("{event}: {}", self.text),
            None => self.text.clone(),
        }
    }

    /// The fields as RFC 5424 has them; `-` for none.
    fn data(&self) -> String {
        if self.fields.is_empty() {
            return "-".into();
        }
        let mut out = format!("[{ELEMENT}");
        for (name, value) in &self.fields {
            let value = one_line(value);
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace(']', "\\]");
            let _ = write!(out, " {name}=\"{value}\"");
        }
        out.push(']');
        out
    }
}

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        match key.as_str() {
            "event" => self.event = Some(value.to_string()),
            name => self.fields.push((name.to_string(), value.to_string())),
        }
        Ok(())
    }
}

/// One line that is harmless, and not too long.
fn one_line(text: &str) -> String {
    // Cut before, too: escaping makes it up to ten times as long.
    let most = text.char_indices().nth(LONGEST).map_or(text.len(), |(at, _)| at);
    // What QEMU or a guest wrote has lines, which are read well enough as one.
    let spaced = text[..most].replace(['\n', '\r', '\t'], " ");
    let mut line = escape::line(&spaced);
    if line.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|n| line.is_char_boundary(*n)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    line
}

/// Who writes, and in which form.
#[derive(Debug)]
pub struct Writer {
    /// The form.
    pub form: Form,
    /// This host's name, in the newer form.
    pub host: String,
    /// This process.
    pub pid: u32,
}

impl LogFormat<&Line> for Writer {
    fn format<W: Write>(&self, w: &mut W, severity: Severity, line: &Line) -> syslog::Result<()> {
        let priority = Facility::LOG_DAEMON as u8 | severity as u8;
        let text = self.text(priority, local(SystemTime::now()), line);
        // One write, which is one datagram.
        w.write_all(text.as_bytes()).map_err(syslog::Error::Write)
    }
}

impl Writer {
    fn text(&self, priority: u8, at: Moment, line: &Line) -> String {
        let ((year, month, day), (hour, minute, second)) = (at.date, at.time);
        let pid = self.pid;
        if self.form == Form::Rfc3164 {
            let name =
                usize::try_from(month - 1).ok().and_then(|m| MONTHS.get(m)).unwrap_or(&"Jan");
            let fields = if line.fields.is_empty() { String::new() } else { line.data() };
            let space = if fields.is_empty() { "" } else { " " };
            return format!(
                "<{priority}>{name} {day:2} {hour:02}:{minute:02}:{second:02} vmcache[{pid}]: {}{space}{fields}",
                line.told()
            );
        }
        let sign = if at.ahead < 0 { '-' } else { '+' };
        let (ahead_hours, ahead_minutes) = (at.ahead.abs() / 60, at.ahead.abs() % 60);
        format!(
            "<{priority}>1 {year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}\
             {sign}{ahead_hours:02}:{ahead_minutes:02} {} vmcache {pid} {} {} {}",
            at.micros,
            self.host,
            line.event.as_deref().unwrap_or("-"),
            line.data(),
            line.text
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        let fields = vec![("vm".into(), "ab".into()), ("pid".into(), "a\"]\\b".into())];
        Line { event: Some("vm-ready".into()), fields, text: one_line("VM ab\nis ready") }
    }

    const AT: Moment =
        Moment { date: (2026, 3, 5), time: (7, 8, 9), micros: 1200, ahead: -(5 * 60 + 30) };

    #[test]
    fn the_newer_form_has_zone_name_and_data() {
        let writer = Writer { form: Form::Rfc5424, host: "node".into(), pid: 7 };
        assert_eq!(
            writer.text(30, AT, &line()),
            "<30>1 2026-03-05T07:08:09.001200-05:30 node vmcache 7 vm-ready \
             [vmcache@32473 vm=\"ab\" pid=\"a\\\"\\]\\\\b\"] VM ab is ready"
        );
        let plain = Line { text: "x".into(), ..Line::default() };
        assert!(writer.text(30, AT, &plain).ends_with(" node vmcache 7 - - x"));
    }

    #[test]
    fn the_classic_form_has_them_in_the_text() {
        let writer = Writer { form: Form::Rfc3164, host: "node".into(), pid: 7 };
        assert_eq!(
            writer.text(27, AT, &line()),
            "<27>Mar  5 07:08:09 vmcache[7]: vm-ready: VM ab is ready \
             [vmcache@32473 vm=\"ab\" pid=\"a\\\"\\]\\\\b\"]"
        );
    }

    #[test]
    fn a_message_is_one_line_of_a_bounded_length() {
        let long = one_line(&"é\n".repeat(LONGEST));
        assert!(long.len() <= LONGEST + '…'.len_utf8() && !long.contains('\n'));
        assert_eq!(one_line("a\x1b[2J\u{202e}b\r\nc"), "a\\x1b[2J\\u{202e}b  c");
    }
}
