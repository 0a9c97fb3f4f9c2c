//! Printing the configuration: as TOML with origins, and as the README's table.

use super::options::{Fallback, OPTIONS};
use super::raw::Value;
use super::Config;

/// A value as TOML writes it.
pub fn literal(value: &Value) -> String {
    match value {
        Value::Text(t) => format!("{t:?}"),
        Value::Number(n) => n.to_string(),
        Value::Flag(b) => b.to_string(),
        Value::List(l) => format!("{l:?}"),
    }
}

/// The effective configuration as TOML, each value with its origin.
pub fn show(config: &Config) -> String {
    let mut out = String::new();
    let mut table = "";
    for option in &OPTIONS {
        if option.table != table {
            table = option.table;
            out.push_str(&format!("{}[{table}]\n", if out.is_empty() { "" } else { "\n" }));
        }
        let value = literal(&config.value(option.table, option.key));
        let place = config.place(option.table, option.key);
        out.push_str(&format!("{} = {value}  # {place}\n", option.key));
    }
    out
}

/// All options as a table in Markdown.
pub fn markdown() -> String {
    let mut out = String::from("| table | option | default | what it does |\n|---|---|---|---|\n");
    for option in &OPTIONS {
        let default = match option.default {
            Fallback::Text(t) => format!("`{t:?}`"),
            Fallback::Number(n) => format!("`{n}`"),
            Fallback::Flag(b) => format!("`{b}`"),
            Fallback::List(l) => format!("`{l:?}`"),
        };
        out.push_str(&format!(
            "| `{}` | `{}` | {default} | {} |\n",
            option.table, option.key, option.help
        ));
    }
    out
}
