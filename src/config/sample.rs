//! A configuration file with every option: what a package installs, and what one begins with.

use super::options::{Opt, FACTORY, OPTIONS, OURS, QEMU};
use super::show;
use super::Value;

/// Columns of a comment.
const WIDTH: usize = 88;

/// What a package sets, other than vmcache's own defaults: in TOML.
const PACKAGED: [(&str, &str, &str); 5] = [
    (QEMU, "kernel", "\"/var/lib/vmcache/guest/vmlinuz\""),
    (QEMU, "initrd", "\"/var/lib/vmcache/guest/initramfs.img\""),
    (FACTORY, "template_path", "\"/run/vmcache/template\""),
    (FACTORY, "vm_cache_endpoint", "\"/run/vmcache/cache.sock\""),
    (OURS, "vm_store_path", "\"/run/vmcache/vm\""),
];

/// What whoever has installed it has to choose.
const CHOICE: (&str, &str) = (FACTORY, "vm_cache_number");

/// The file; as a package has it, or with all options as comments.
pub fn sample(packaged: bool) -> String {
    let mut out = String::from(
        "# Configuration of vmcache: vmcache.toml(5). Every option stands here with what it is\n\
         # when it is left out. `vmcache config check` checks, `systemctl reload vmcache` takes\n\
         # it up. Files in conf.d beside this one are read after it.\n",
    );
    let mut table = "";
    for option in &OPTIONS {
        if option.table != table {
            table = option.table;
            out.push_str(&format!("\n[{table}]\n"));
        }
        out.push_str(&comment(option.help));
        let set = PACKAGED.iter().find(|(t, k, _)| packaged && (*t, *k) == (table, option.key));
        if (table, option.key) == CHOICE {
            out.push_str("# TO CHOOSE: how many? Until then nothing is started.\n");
        }
        match set {
            Some((_, key, value)) => {
                out.push_str(&format!("#{key} = {}\n{key} = {value}\n", default(option)));
            }
            None => out.push_str(&format!("#{} = {}\n", option.key, default(option))),
        }
    }
    out
}

/// An option's default, as TOML writes it.
pub fn default(option: &Opt) -> String {
    show::literal(&Value::of(option.default))
}

fn comment(text: &str) -> String {
    let mut out = String::new();
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    out + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;
    use std::path::Path;

    #[test]
    fn a_sample_says_what_is_so_without_it() {
        let plain = Config::parse(Path::new("s"), &sample(false)).unwrap();
        assert!(OPTIONS.iter().all(|o| !plain.given(o.table, o.key)));
        let all = sample(false).replace("#", "").replace(" TO CHOOSE", "# TO CHOOSE");
        let all: String = all
            .lines()
            .filter(|l| l.starts_with('[') || l.split(' ').nth(1) == Some("="))
            .map(|l| format!("{l}\n"))
            .collect();
        let said = Config::parse(Path::new("s"), &all).unwrap();
        for option in &OPTIONS {
            assert!(said.given(option.table, option.key), "{}", option.key);
            let value = said.literal(option.table, option.key);
            assert_eq!(value, default(option), "{}", option.key);
        }
    }

    #[test]
    fn a_packages_file_sets_what_a_package_knows() {
        let config = Config::parse(Path::new("s"), &sample(true)).unwrap();
        for (table, key, value) in PACKAGED {
            assert_eq!(config.literal(table, key), value);
        }
        assert_eq!(config.pool, 0);
    }
}
