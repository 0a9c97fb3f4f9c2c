//! What Kata makes of its configuration file, for the keys that its versions share.
//!
//! Source: the configuration loaders of Kata 1.13 and 3.20.0, and what servers of
//! theirs sent (tests/fixtures).

use std::path::Path;

use serde_json::{json, Map, Value};

use crate::config::options::QEMU;
use crate::config::Config;

/// Most CPUs of a VM on x86-64 there.
const MOST_CPUS: u64 = 240;

/// Kata's keys of a VmConfig, one after the other.
pub struct Keys<'a> {
    pub config: &'a Config,
    map: Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub fn of(config: &'a Config) -> Keys<'a> {
        Keys { config, map: Map::new() }
    }

    pub fn done(self) -> Map<String, Value> {
        self.map
    }

    /// A value that no file decides.
    pub fn put(&mut self, name: &str, value: impl Into<Value>) {
        self.map.insert(name.into(), value.into());
    }

    /// Text; `default` where there is none.
    pub fn text(&mut self, name: &str, key: &str, default: &str) {
        let value = match self.config.text(QEMU, key) {
            "" => default,
            given => given,
        };
        self.put(name, value);
    }

    /// A path, with its symbolic links resolved, as Kata sends it. One that does
    /// not exist stays as it is: whether it must is not decided here.
    pub fn path(&mut self, name: &str, key: &str) {
        let path = self.config.text(QEMU, key);
        let real = Path::new(path).canonicalize();
        let text = real.map_or(path.to_string(), |p| p.to_string_lossy().into_owned());
        self.put(name, text);
    }

    /// A number; `default` where it is zero or not there.
    pub fn number(&mut self, name: &str, key: &str, default: u64) {
        let value = match self.config.number(QEMU, key) {
            0 => default,
            given => given,
        };
        self.put(name, value);
    }

    /// True or false.
    pub fn flag(&mut self, name: &str, key: &str) {
        self.put(name, self.config.flag(QEMU, key));
    }

    /// A list; null where it is not there, which is another thing than an empty one.
    pub fn list(&mut self, name: &str, key: &str) {
        let given = self.config.given(QEMU, key);
        self.put(name, given.then(|| self.config.list(QEMU, key)));
    }

    /// A list of options, its white space and empty members taken out.
    pub fn options(&mut self, name: &str, key: &str) {
        let text = self.config.text(QEMU, key);
        let kept: Vec<&str> = text.split(',').filter(|o| !o.is_empty()).map(str::trim).collect();
        self.put(name, kept.join(",").trim_matches(',').to_string());
    }

    /// The most CPUs that a VM can be given, of this many that there are.
    pub fn most_cpus(&mut self, there: u64) {
        let wanted = self.config.number(QEMU, "default_maxvcpus");
        let most = if wanted == 0 || wanted >= there { there } else { wanted };
        self.put("DefaultMaxVCPUs", most.min(MOST_CPUS));
    }

    /// Kernel parameters: the hypervisor's, `agent`'s, and the file's, which
    /// `split` into words.
    pub fn kernel_params(&mut self, agent: &[String], split: fn(&str) -> Vec<String>) {
        let mut words: Vec<String> = Vec::new();
        if !self.config.text(QEMU, "image").is_empty() {
            words.extend(
                [
                    "systemd.unit=kata-containers.target",
                    "systemd.mask=systemd-networkd.service",
                    "systemd.mask=systemd-networkd.socket",
                ]
                .map(String::from),
            );
        }
        if self.config.text(QEMU, "block_device_driver") == "virtio-scsi" {
            words.push("scsi_mod.scan=none".into());
        }
        words.extend_from_slice(agent);
        words.extend(split(self.config.text(QEMU, "kernel_params")));
        let params = words.iter().map(|word| {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            json!({"Key": key, "Value": value})
        });
        self.put("KernelParams", params.collect::<Vec<_>>());
    }
}

/// At white space.
pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(String::from).collect()
}

/// At spaces that stand in no quotation.
pub fn unquoted_words(text: &str) -> Vec<String> {
    let mut quoted = false;
    let pieces = text.split(|c| {
        quoted ^= c == '"';
        c == ' ' && !quoted
    });
    pieces.map(str::trim).filter(|w| !w.is_empty()).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_options_are_split_as_kata_splits_them() {
        assert_eq!(words("a=b  \"c d\"\te"), ["a=b", "\"c", "d\"", "e"]);
        assert_eq!(unquoted_words("a=b  x=\"c d\" e\tf"), ["a=b", "x=\"c d\"", "e\tf"]);
        let text = "[hypervisor.qemu]\ncpu_features = \" pmu=off,, +x ,\"\n";
        let config = Config::parse(Path::new("c.toml"), text).unwrap();
        let mut keys = Keys::of(&config);
        keys.options("CPUFeatures", "cpu_features");
        keys.list("PFlash", "pflashes");
        let map = keys.done();
        assert_eq!((&map["CPUFeatures"], &map["PFlash"]), (&json!("pmu=off,+x"), &Value::Null));
    }
}
