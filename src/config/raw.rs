//! The files, as written: which value stands where.
//!
//! Reads one file and the drop-ins beside it (`conf.d/*.toml`, in the order of
//! their names; a later value replaces an earlier one) and remembers file and
//! line of every value, so that an error can name them. Checks types; what the
//! values mean is the business of the parent module.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::options::{find, Fallback, AGENT, FACTORY, OURS, PROXY, QEMU};
use super::{Error, Place};
use crate::trusted_path::TrustedPath;

/// Largest file read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// A value and where it stands.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The value.
    pub value: Value,
    /// Its file and line.
    pub place: Place,
}

/// A value of one of the types that options have.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    Text(String),
    /// A whole number, at least zero.
    Number(u64),
    /// True or false.
    Flag(bool),
    /// Texts.
    List(Vec<String>),
}

impl Value {
    /// An option's default.
    pub fn of(default: Fallback) -> Value {
        match default {
            Fallback::Text(t) => Value::Text(t.to_string()),
            Fallback::Number(n) => Value::Number(n),
            Fallback::Flag(b) => Value::Flag(b),
            Fallback::List(l) => Value::List(l.iter().map(|s| s.to_string()).collect()),
        }
    }
}

/// All that was read.
#[derive(Debug, Default)]
pub struct Raw {
    /// The files, in the order in which they were read.
    pub files: Vec<PathBuf>,
    /// By table and key.
    pub entries: BTreeMap<(String, String), Entry>,
    /// Lines for the log.
    pub warnings: Vec<String>,
}

impl Raw {
    /// Reads a file and its drop-ins.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn read(file: &Path) -> Result<Raw, Error> {
        let mut raw = Raw::default();
        raw.add(file)?;
        for path in drop_ins(file)? {
            raw.add(&path)?;
        }
        Ok(raw)
    }

    fn add(&mut self, file: &Path) -> Result<(), Error> {
        let text = text(file).map_err(|source| Error::Read { file: file.into(), source })?;
        self.add_text(file, &text)?;
        self.files.push(file.to_path_buf());
        Ok(())
    }

    /// Adds one file's text.
    pub fn add_text(&mut self, file: &Path, text: &str) -> Result<(), Error> {
        let place = |at: usize| Place {
            file: file.to_path_buf(),
            line: text[..at.min(text.len())].matches('\n').count() + 1,
        };
        let table = DeTable::parse(text).map_err(|e| Error::Syntax {
            place: place(e.span().map_or(0, |s| s.start)),
            why: e.message().to_string(),
        })?;
        self.walk(table.get_ref(), "", &place)
    }

    fn walk(
        &mut self,
        table: &DeTable<'_>,
        path: &str,
        place: &dyn Fn(usize) -> Place,
    ) -> Result<(), Error> {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            if let DeValue::Table(inner) = value.get_ref() {
                let below =
                    if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
                self.walk(inner, &below, place)?;
                continue;
            }
            let at = place(key.span().start);
            let Some(option) = find(path, name) else {
                self.unknown(path, name, at)?;
                continue;
            };
            let value = convert(value.get_ref(), option.default).ok_or_else(|| Error::Type {
                place: at.clone(),
                key: format!("{path}.{name}"),
                found: describe(value.get_ref()),
                wanted: option.default.kind(),
            })?;
            self.entries.insert((path.to_string(), name.to_string()), Entry { value, place: at });
        }
        Ok(())
    }

    fn unknown(&mut self, table: &str, key: &str, place: Place) -> Result<(), Error> {
        if table == OURS || table.starts_with("vmcache.") {
            return Err(Error::UnknownKey { place, key: format!("{table}.{key}") });
        }
        if [QEMU, FACTORY, AGENT, PROXY].contains(&table) {
            self.warnings.push(format!("{place}: {table}.{key} is not known, and has no effect"));
        }
        Ok(())
    }
}

/// All of a file that passes the check of paths.
fn text(file: &Path) -> io::Result<String> {
    let file = TrustedPath::file(file)?.open()?;
    let size = file.metadata()?.len();
    if size > MAX_FILE {
        return Err(io::Error::other(format!("{size} bytes, over {MAX_FILE}")));
    }
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// What is read after a file. A directory that this user may not enter has nothing for it.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, Error> {
    let dir = file.parent().unwrap_or(Path::new("")).join("conf.d");
    let names = match TrustedPath::directory(&dir).and_then(|dir| dir.names()) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            return Ok(Vec::new());
        }
        names => names.map_err(|source| Error::Read { file: dir.clone(), source })?,
    };
    let toml = |p: &PathBuf| p.extension().is_some_and(|e| e == "toml");
    let mut more: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).filter(toml).collect();
    more.sort();
    Ok(more)
}

/// The server's socket in files that are no configuration otherwise: whoever broke one
/// can still see what the server does that runs.
pub fn endpoint_alone(file: &Path) -> Option<PathBuf> {
    let mut found = None;
    for file in [file.to_path_buf()].into_iter().chain(drop_ins(file).unwrap_or_default()) {
        let Ok(text) = text(&file) else { continue };
        let table: Option<toml::Table> = text.parse().ok();
        let named = table.as_ref().and_then(|t| t.get(FACTORY)?.get("vm_cache_endpoint")?.as_str());
        found = named.map(PathBuf::from).or(found);
    }
    found
}

fn convert(value: &DeValue<'_>, kind: Fallback) -> Option<Value> {
    match (kind, value) {
        (Fallback::Text(_), DeValue::String(s)) => Some(Value::Text(s.to_string())),
        (Fallback::Flag(_), DeValue::Boolean(b)) => Some(Value::Flag(*b)),
        (Fallback::Number(_), DeValue::Integer(n)) => {
            let plain = n.as_str().replace('_', "");
            // Kata uses -1 for "as many as the host has", which 0 means too.
            if plain == "-1" {
                return Some(Value::Number(0));
            }
            u64::from_str_radix(&plain, n.radix()).ok().map(Value::Number)
        }
        (Fallback::Number(_), DeValue::Float(f)) => {
            // Kata 3.x takes a fraction of a CPU; a VM has whole ones.
            let n: f64 = f.as_str().parse().ok()?;
            (0.0..1e9).contains(&n).then(|| Value::Number(n.ceil() as u64))
        }
        (Fallback::List(_), DeValue::Array(list)) => {
            let texts = list.iter().map(|v| v.get_ref().as_str().map(str::to_string));
            texts.collect::<Option<Vec<_>>>().map(Value::List)
        }
        _ => None,
    }
}

fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(s) => format!("the string {s:?}"),
        DeValue::Integer(n) => format!("the number {n}"),
        DeValue::Float(n) => format!("the number {n}"),
        DeValue::Boolean(b) => b.to_string(),
        DeValue::Datetime(d) => format!("the date {d}"),
        DeValue::Array(_) => "a list".to_string(),
        DeValue::Table(_) => "a table".to_string(),
    }
}
