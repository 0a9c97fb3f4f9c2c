//! The manual: vmcache(1) and a page for each command, vmcached(8), vmcache.toml(5),
//! vmcache-security(7).

use std::io;

use clap::{Command, CommandFactory};
use clap_mangen::roff::{bold, italic, roman, Inline, Roff};
use clap_mangen::Man;

use super::{commands, security};
use crate::cli::args::Cli;
use crate::cli::metrics::FAMILIES;
use crate::config::options::{Opt, OPTIONS};
use crate::config::{sample, SEARCH};
use crate::events::{EVENTS, FIELDS};

/// Names and texts.
pub fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut all = Vec::new();
    let command = Cli::command();
    page(command, "vmcache", &mut all)?;
    all.push(("vmcached.8".into(), daemon().into_bytes()));
    all.push(("vmcache.toml.5".into(), options().into_bytes()));
    all.push(("vmcache-security.7".into(), security::page().into_bytes()));
    Ok(all)
}

/// A command's page and those of its own commands.
fn page(command: Command, name: &str, all: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    // Known in each page, though it is said once.
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let inner: Vec<Command> =
        command.get_subcommands().filter(|c| !c.is_hide_set()).cloned().collect();
    let spaced = name.replace('-', " ");
    let shown = command.name(leaked(name)).bin_name(spaced.clone()).display_name(name.to_string());
    let mut text = Vec::new();
    let manual = format!("vmcache {}", env!("CARGO_PKG_VERSION"));
    Man::new(shown).section("1").source(manual).manual("vmcache").date("").render(&mut text)?;
    let mut more = Roff::default();
    if name == "vmcache" {
        section(&mut more, "ENVIRONMENT");
        for (variable, what) in [
            ("VMCACHE_CONFIG", "The configuration file, when --config names none."),
            ("VMCACHE_ENDPOINT", "The server's socket, when --endpoint names none."),
            ("VMCACHE_LOG_LEVEL", "What is logged at least, when --log-level says nothing."),
        ] {
            item(&mut more, variable, what);
        }
        files(&mut more);
    }
    commands::more(&mut more, name);
    see_also(&mut more);
    text.extend(more.render().into_bytes());
    all.push((format!("{name}.1"), text));
    for command in inner {
        let name = format!("{name}-{}", command.get_name());
        page(command, &name, all)?;
    }
    Ok(())
}

/// clap takes names that live for ever; so does this program's manual.
fn leaked(name: &str) -> &'static str {
    Box::leak(name.to_string().into_boxed_str())
}

pub(super) fn head(page: &mut Roff, title: &str, number: &str, name: &str) {
    page.control(
        "TH",
        [title, number, "", &format!("vmcache {}", env!("CARGO_PKG_VERSION")), "vmcache"],
    );
    section(page, "NAME");
    page.text([roman(name)]);
}

pub(super) fn section(page: &mut Roff, title: &str) {
    page.control("SH", [title]);
}

pub(super) fn item(page: &mut Roff, term: &str, text: &str) {
    page.control("TP", []);
    page.text([bold(term)]);
    page.text([roman(text)]);
}

pub(super) fn paragraph(page: &mut Roff, parts: impl Into<Vec<Inline>>) {
    page.control("PP", []);
    page.text(parts);
}

pub(super) fn see_also(page: &mut Roff) {
    section(page, "SEE ALSO");
    page.text([
        bold("vmcache"),
        roman("(1), "),
        bold("vmcached"),
        roman("(8), "),
        bold("vmcache.toml"),
        roman("(5), "),
        bold("vmcache-security"),
        roman("(7)"),
    ]);
}

fn files(page: &mut Roff) {
    section(page, "FILES");
    for file in SEARCH {
        item(page, file, "Configuration: the first of these that exists.");
    }
    item(page, "/etc/vmcache/conf.d/*.toml", "Read after it, in the order of their names.");
    item(page, "/run/vmcache/cache.sock", "The server's socket, in the package's configuration.");
    item(page, "/run/vmcache/vm", "A directory for each VM, likewise.");
    item(page, "/var/lib/vmcache/guest", "Kernel and initramfs, made by `vmcache guest build`.");
}

fn daemon() -> String {
    let mut page = Roff::default();
    head(&mut page, "VMCACHED", "8", "vmcached - the server that keeps VMs ready: vmcache serve");
    section(&mut page, "SYNOPSIS");
    page.text([bold("vmcache serve"), roman(" [--config "), italic("FILE"), roman("]")]);
    section(&mut page, "DESCRIPTION");
    page.text([roman(
        "The server boots VMs ahead of time and hands each out once, over gRPC on a Unix socket. \
         It runs in the foreground; vmcache.service starts it. VMs that were handed out outlive \
         it; those that stand ready outlive a restart. With vm_cache_number 0 or not set it says \
         so and ends.",
    )]);
    section(&mut page, "SIGNALS");
    for (signal, what) in [
        ("SIGTERM, SIGINT", "Stop: VMs that stand ready are ended, claims are refused."),
        (
            "SIGHUP, SIGUSR2",
            "Take up the configuration: it is checked, and if it is good the program is executed \
             anew in the same process. No VM and no claim is lost. VMs of an older kernel or \
             program are handed out until new ones stand in their place; those of another size \
             are ended at once. If it is not good, the server goes on as before and logs \
             restart-refused.",
        ),
        ("SIGUSR1", "End and leave all VMs to the next server: what systemctl restart does."),
    ] {
        item(&mut page, signal, what);
    }
    section(&mut page, "EXIT STATUS");
    for (code, what) in [
        ("0", "Stopped, or switched off."),
        ("1", "It could not start or not restart; what was said tells why."),
        ("2", "The configuration is wrong."),
        ("5", "A file or program that is needed is missing."),
        ("101", "A defect; its VMs are the next server's."),
    ] {
        item(&mut page, code, what);
    }
    section(&mut page, "LOG");
    page.text([roman(
        "One line an event. In RFC 5424's form the event is the MSGID and the fields are the \
         structured data of the element vmcache@32473; in RFC 3164's, which /dev/log gets, the \
         event begins the line and the fields end it. No file is written, so nothing is to be \
         rotated.",
    )]);
    for (field, what) in FIELDS {
        item(&mut page, field, what);
    }
    section(&mut page, "EVENTS");
    page.text([roman("By their names, which stay, each with its level.")]);
    for event in EVENTS {
        let level = event.level.as_str().to_lowercase();
        page.control("TP", []);
        page.text([bold(event.name), roman(format!(" ({level})"))]);
        page.text([roman(event.meaning)]);
    }
    section(&mut page, "METRICS");
    page.text([roman("What vmcache status --openmetrics prints.")]);
    for (name, kind, what) in FAMILIES {
        page.control("TP", []);
        page.text([bold(*name), roman(format!(" ({kind})"))]);
        page.text([roman(*what)]);
    }
    files(&mut page);
    see_also(&mut page);
    page.render()
}

fn options() -> String {
    let mut page = Roff::default();
    head(&mut page, "VMCACHE.TOML", "5", "vmcache.toml - configuration of vmcache");
    section(&mut page, "DESCRIPTION");
    page.text([roman(
        "Kata Containers' configuration file, tables and names, and a table of vmcache's own. \
         An unknown option is an error in [vmcache] and a warning in Kata's tables. vmcache \
         config check checks a file and what it names; vmcache config show prints every value \
         and the line on which it stands.",
    )]);
    let mut table = "";
    for option in &OPTIONS {
        if option.table != table {
            table = option.table;
            section(&mut page, &format!("[{table}]").to_uppercase());
        }
        entry(&mut page, option);
    }
    whose_paths(&mut page);
    section(&mut page, "EXAMPLES");
    paragraph(&mut page, [roman("Four VMs of one CPU and 256 MiB, as clones of a template:")]);
    page.control("nf", []);
    for line in [
        "[hypervisor.qemu]",
        "default_memory = 256",
        "[factory]",
        "vm_cache_number = 4",
        "enable_template = true",
    ] {
        page.text([roman(line)]);
    }
    page.control("fi", []);
    files(&mut page);
    see_also(&mut page);
    page.render()
}

/// Which paths are refused, and what for.
fn whose_paths(page: &mut Roff) {
    section(page, "WHOSE PATHS");
    page.text([roman(
        "Whoever can change a path that stands here decides what the server does. Every component \
         of it, from / on, must be root's or the server's user's, and not writable for others: \
         not for everybody; for a group only if that is root's or the server's own; and with no \
         access control list that lets others write. The same holds for the configuration and \
         conf.d themselves, for servers and for commands.",
    )]);
    for text in [
        "A directory that others may write and that is sticky, as /tmp, passes, since the entry \
         below it must be root's or this user's. template_path and conf.d may not be such a \
         directory themselves.",
        "A symbolic link is followed where nobody else can change it, and where it leads must \
         pass alike. What is written, locked or replaced is never a link.",
        "A FIFO, a socket or a device where a file is needed is refused, and not opened. So is a \
         FUSE file system of another user.",
        "The error names the component, whose it is, and what to do. /usr/local of mode 2775 and \
         group staff, as older Debian systems have it, is refused: chmod g-w.",
    ] {
        paragraph(page, [roman(text)]);
    }
}

fn entry(page: &mut Roff, option: &Opt) {
    page.control("TP", []);
    page.text([bold(option.key), roman(" = "), italic(sample::default(option))]);
    let mut help = option.help.to_string();
    if let Some(first) = help.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    page.text([roman(format!("{help}."))]);
}
