//! The command line: every command and option, and the help that one reads.

mod attach;
mod setup;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

pub use attach::Attach;
pub use setup::{ConfigCommand, Contents, Generate, Guest, GuestBuild, Mkinitrd};

use nix::sys::signal::Signal;

use crate::factory::Wanted;
use crate::sys::signal::real_time;
use crate::tree::extract::MAX_ENTRIES;

/// VMs that are booted before anyone asks
#[derive(Debug, Parser)]
#[command(
    name = "vmcache",
    version,
    after_help = "Exit codes: 0 done; 1 failed; 2 usage or configuration; 3 no server reachable; \
                  4 no VM in time; 5 a needed file or program is missing. `run` and `exec` exit \
                  with their command's code, or 124 timed out, 125 vmcache failed, \
                  126 not executable, 127 not found, 128+n ended by signal n."
)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command knows.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Configuration file [default: $VMCACHE_CONFIG, or the first of
    /// /etc/vmcache, /etc/kata-containers, /usr/share/defaults/kata-containers]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The server's socket [default: the configuration's]
    #[arg(long, global = true, value_name = "SOCKET", env = "VMCACHE_ENDPOINT")]
    pub endpoint: Option<PathBuf>,
    /// Where messages go [default: syslog for a server without a terminal, else stderr]
    #[arg(long, global = true, value_enum)]
    pub log: Option<LogTo>,
    /// What is logged at least: error, warn, info, debug or trace [default: info for a
    /// server, or as its configuration says; else warn]
    #[arg(
        long = "log-level",
        id = "least",
        global = true,
        value_name = "LEVEL",
        env = "VMCACHE_LOG_LEVEL"
    )]
    pub log_level: Option<String>,
}

/// Where messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogTo {
    /// The system's log.
    Syslog,
    /// Standard error.
    Stderr,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep a pool of VMs and hand them out (runs in the foreground)
    Serve,
    /// Show the pool, its VMs, counters and the last error
    Status(Status),
    /// Claim a VM and leave it running: it is yours then
    Get(Get),
    /// Claim a VM, run a command in it, exit with the command's code, end the VM
    Run(Run),
    /// Run a further command in a VM that was claimed
    Exec(Exec),
    /// Copy files into a VM (PATH ID:PATH) or out of it (ID:PATH PATH)
    Cp(Cp),
    /// Send a signal to a command in a VM that was claimed
    Kill(Kill),
    /// List the processes of a VM, each with the name of the command that started it
    Ps(Ps),
    /// Show what the containers of a VM use
    Stats(One),
    /// Stop a VM's virtual CPUs
    Pause(One),
    /// Let them run again
    Resume(One),
    /// End VMs that were claimed
    Stop(Many),
    /// List the VMs that were claimed on this host
    List(Json),
    /// Stop the server; VMs that were handed out stay
    Quit(Quit),
    /// Execute the server's program anew; no VM and no claim is lost
    Restart,
    /// Hand nothing out any more, and end what stands ready, until `resize`
    Drain,
    /// Keep so many VMs ready, until the server ends
    Resize(Resize),
    /// What agents can do
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Carry connections to an agent of Kata 1.x on a VM's serial port (servers start it)
    Proxy(Proxy),
    /// See whether this host can do what its configuration asks for; boots a guest
    Doctor(Doctor),
    /// Measure the server: claims, runs, refill, with ratios and a histogram
    Bench(Bench),
    /// Kata's names for serve, status and quit; without a cache, for the template's
    #[command(subcommand)]
    Factory(Factory),
    /// Make, look at or remove the template that clones are made from
    #[command(subcommand)]
    Template(Template),
    /// Make an initramfs of the guest agent, kernel modules and a userland
    Mkinitrd(Mkinitrd),
    /// Make a guest from what this host has installed
    #[command(subcommand)]
    Guest(Guest),
    /// Check or show the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Write manual pages, completions and a configuration, for a package
    #[command(hide = true)]
    Generate(Generate),
}

#[derive(Args, Clone, Copy, Debug)]
pub struct Json {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct Doctor {
    #[command(flatten)]
    pub json: Json,
    /// Boot no guest
    #[arg(long)]
    pub no_boot: bool,
}

#[derive(Args, Debug)]
pub struct Status {
    #[command(flatten)]
    pub json: Json,
    /// Show it again every second
    #[arg(long)]
    pub watch: bool,
    /// Print OpenMetrics
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    pub openmetrics: bool,
    /// Put that into a file, whole, in the form of node_exporter's textfile collector
    #[arg(long, value_name = "FILE", requires = "openmetrics")]
    pub output: Option<PathBuf>,
    /// Do that again every so many seconds, until this is ended
    #[arg(long, value_name = "SECONDS", requires = "output", value_parser = some_seconds)]
    pub every: Option<Duration>,
    /// Print nothing; exit code 1, with the reason, when the server has a stuck thread
    /// (live), or no VM stands ready (ready)
    #[arg(long, value_enum, conflicts_with_all = ["json", "watch", "openmetrics"])]
    pub check: Option<Check>,
}

/// What a supervisor asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Check {
    /// Whether it has to be restarted.
    Live,
    /// Whether a claim would be served at once.
    Ready,
}

#[derive(Args, Clone, Copy, Debug)]
pub struct Size {
    /// CPUs of the VM; more than the pool's have are added [default: the pool's]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Memory of the VM, MiB; more than the pool's have is added, in pieces of
    /// 128 MiB [default: the pool's]
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u32>,
}

impl Size {
    /// What to ask a factory for.
    pub fn within(self, within: Duration) -> Wanted {
        let within = Some(within);
        Wanted { cpus: self.cpus, memory_mib: self.memory, within }
    }
}

#[derive(Args, Debug)]
pub struct Quit {
    /// Leave the VMs that stand ready to the next server, which has to be started
    #[arg(long)]
    pub leave: bool,
}

#[derive(Args, Debug)]
pub struct Resize {
    /// VMs to keep ready
    #[arg(value_name = "N")]
    pub target: u32,
}

#[derive(Args, Debug)]
pub struct Get {
    #[command(flatten)]
    pub json: Json,
    /// Shown in status beside the VM
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    #[command(flatten)]
    pub size: Size,
    /// Seconds to wait for a VM; with 0, only one that stands ready
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub wait: Duration,
}

#[derive(Args, Debug)]
pub struct Process {
    /// Set a variable of the command's environment; without a value, to the one that it
    /// has here, or to none
    #[arg(long, short, value_name = "KEY[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory in the guest
    #[arg(long, short, value_name = "DIR", default_value = "/")]
    pub workdir: String,
    /// User to run as: name or number, and group, as the guest knows them
    #[arg(long, short, value_name = "USER[:GROUP]", allow_hyphen_values = true)]
    pub user: Option<String>,
    /// Give the command a terminal: this one, raw
    #[arg(long, short)]
    pub tty: bool,
    /// Read no standard input, as `ssh -n`: the command's is at its end
    #[arg(long, short = 'n', conflicts_with = "tty")]
    pub no_stdin: bool,
    /// End the command after so many seconds, with exit code 124. They begin before its
    /// start in the guest, and after the wait for a VM and for a root file system
    #[arg(long, value_name = "SECONDS", value_parser = some_seconds)]
    pub timeout: Option<Duration>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Args, Debug)]
pub struct Run {
    #[command(flatten)]
    pub size: Size,
    /// Root file system for the command: a directory or a tar file
    #[arg(long, value_name = "DIR|TAR")]
    pub rootfs: Option<PathBuf>,
    #[command(flatten)]
    pub attach: Attach,
    /// Leave the VM running afterwards, and print its id on stderr
    #[arg(long)]
    pub keep: bool,
    /// Boot a VM now instead of taking one from the pool
    #[arg(long)]
    pub cold: bool,
    /// Seconds to wait for a VM; with 0, only one that stands ready
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub wait: Duration,
    #[command(flatten)]
    pub process: Process,
}

#[derive(Args, Debug)]
pub struct Exec {
    /// The VM: its id, or the beginning of it
    pub id: String,
    #[command(flatten)]
    pub process: Process,
}

#[derive(Args, Debug)]
pub struct Kill {
    /// The VM: its id, or the beginning of it
    pub id: String,
    /// The signal: a name, with or without SIG, such as TERM or RTMIN+3, or its number
    #[arg(long, short, value_name = "SIGNAL", default_value = "TERM", value_parser = signal)]
    pub signal: i32,
    /// A command of `vmcache exec`, by its name in `vmcache ps` [default: that of
    /// `vmcache run`]
    #[arg(long, value_name = "EXEC", value_parser = NonEmptyStringValueParser::new())]
    pub exec: Option<String>,
}

/// Number of a signal, by its number or name.
fn signal(text: &str) -> Result<i32, String> {
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let (first, last) = (*real_time().start(), *real_time().end());
    let offset = |prefix: &str| match name.strip_prefix(prefix)? {
        "" => Some(0),
        rest => rest.parse::<i32>().ok(),
    };
    let number = match (name.parse::<i32>(), offset("RTMIN"), offset("RTMAX")) {
        (Ok(number), ..) => Some(number).filter(|n| (1..=last).contains(n)),
        (_, Some(n), _) => Some(first + n).filter(|n| (first..=last).contains(n)),
        (_, _, Some(n)) => Some(last + n).filter(|n| (first..=last).contains(n)),
        _ => match name {
            "CLD" => Some(Signal::SIGCHLD as i32),
            "IOT" => Some(Signal::SIGABRT as i32),
            "POLL" => Some(Signal::SIGIO as i32),
            _ => format!("SIG{name}").parse::<Signal>().ok().map(|s| s as i32),
        },
    };
    number.ok_or_else(|| {
        format!("a signal's number, 1 to {last}, or name, such as TERM, KILL, RTMIN+3 or RTMAX-1")
    })
}

#[derive(Args, Debug)]
pub struct Cp {
    /// What to copy, as docker cp: PATH, ID:PATH, or - for a tar stream on standard input.
    /// PATH/. is what is in a directory
    pub source: OsString,
    /// Where to: ID:PATH, PATH, or - for a tar stream on standard output. What is there
    /// decides: into a directory, in a file's place, else by that name. With - as the source,
    /// a directory
    pub target: OsString,
    /// Follow SOURCE if it is a symbolic link; links below it stay links
    #[arg(long, short = 'L')]
    pub follow_link: bool,
    /// Out of a VM whose guest is TRUSTED, and as root: owners, set-id bits, extended
    /// attributes, devices and FIFOs, too. Else files, directories and links come out, as
    /// this user's own
    #[arg(long)]
    pub archive: bool,
    /// Copy no more than this out of a VM: bytes of all files, holes included, with K, M, G
    /// or T (times 1024); and never so much that less than 5 % of the file system is free
    #[arg(long, value_name = "SIZE", default_value = "16G", value_parser = size)]
    pub max_size: u64,
    /// Copy no more files, directories and links than this out of a VM
    #[arg(long, value_name = "N", default_value_t = MAX_ENTRIES)]
    pub max_entries: u64,
}

/// Most seconds of any option: a year.
const MAX_SECONDS: f64 = 31_536_000.0;

/// A time in seconds.
fn seconds(text: &str) -> Result<Duration, String> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number = Some(text).filter(|_| plain).and_then(|t| t.parse::<f64>().ok());
    number
        .filter(|n| *n <= MAX_SECONDS)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("a number of seconds, 0 to {MAX_SECONDS}, such as 90 or 1.5"))
}

/// The same, but for no time at all.
fn some_seconds(text: &str) -> Result<Duration, String> {
    let least = Duration::from_millis(1);
    seconds(text).ok().filter(|t| *t >= least).ok_or_else(|| {
        format!(
            "a number of seconds, 0.001 to {MAX_SECONDS}, such as 90 or 1.5; for no limit, \
                 leave the option out"
        )
    })
}

/// A number of bytes, with K, M, G or T.
fn size(text: &str) -> Result<u64, String> {
    let bad = || "a number, with K, M, G or T after it".to_string();
    let (digits, factor) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 1 << 10),
        Some('M') => (&text[..text.len() - 1], 1 << 20),
        Some('G') => (&text[..text.len() - 1], 1 << 30),
        Some('T') => (&text[..text.len() - 1], 1 << 40),
        _ => (text, 1u64),
    };
    let number = Some(digits).filter(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()));
    number.and_then(|d| d.parse::<u64>().ok()?.checked_mul(factor)).ok_or_else(bad)
}

#[derive(Args, Debug)]
pub struct One {
    /// The VM: its id, or the beginning of it
    pub id: String,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Args, Debug)]
pub struct Ps {
    /// The VM: its id, or the beginning of it
    pub id: String,
    #[command(flatten)]
    pub json: Json,
    /// Arguments for ps, in guests of Kata's agents [default: -ef]; vmcache's own has one table
    #[arg(last = true, value_name = "ARG")]
    pub args: Vec<String>,
}

#[derive(Args, Debug)]
pub struct Many {
    /// The VMs: their ids, or the beginnings of them
    #[arg(required = true)]
    pub ids: Vec<String>,
}

#[derive(Args, Debug)]
pub struct Bench {
    #[command(flatten)]
    pub json: Json,
    /// Claims to measure, and as many runs
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub n: usize,
    /// Clients that claim at once, in a further round; 0: no such round
    #[arg(long, value_name = "CLIENTS", default_value_t = 0)]
    pub concurrency: usize,
    /// Cold runs to compare with (needs a configuration)
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub cold: usize,
    /// Instead, without a server: so many clones of a template beside --cold boots
    #[arg(long, value_name = "CLONES", num_args = 0..=1, default_missing_value = "10")]
    pub refill: Option<usize>,
    /// Instead, how large a pool has to be for so many claims, such as 0.5 (a second),
    /// 30/min or 1800/h, by the refill that is measured now
    #[arg(long, value_name = "RATE", conflicts_with = "refill")]
    pub advise: Option<String>,
    /// Instead, what the relay in front of gRPC costs: calls of root's beside those of this
    /// user, who must be one who may claim
    #[arg(long, value_name = "UID", conflicts_with_all = ["refill", "advise"])]
    pub relay_uid: Option<u32>,
    /// With --relay-uid: calls to measure on a connection in use, each way
    #[arg(long, value_name = "N", default_value_t = 2000, requires = "relay_uid")]
    pub calls: usize,
    /// With --relay-uid: connections to measure, each way
    #[arg(long, value_name = "N", default_value_t = 200, requires = "relay_uid")]
    pub connects: usize,
    /// With --relay-uid: claims to measure, each way, which end as many VMs
    #[arg(long, value_name = "N", default_value_t = 0, requires = "relay_uid")]
    pub claims: usize,
    /// Also watch the server and its pool do nothing for so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    pub idle: Duration,
}

#[derive(Debug, Subcommand)]
pub enum Factory {
    /// As `vmcache serve`
    Init,
    /// As `vmcache status`
    Status(Status),
    /// As `vmcache quit`
    Destroy,
}

#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Print a table of all calls and of the agents that have them
    Matrix(Json),
}

/// Options as kata-proxy's, with one dash or two.
#[derive(Args, Debug)]
pub struct Proxy {
    /// Where to listen: a path or unix:PATH
    #[arg(long, value_name = "SOCKET")]
    pub listen_socket: String,
    /// QEMU's end of the agent's serial port
    #[arg(long, value_name = "SOCKET")]
    pub mux_socket: String,
    /// The sandbox's id, for the log
    #[arg(long, value_name = "ID", default_value = "")]
    pub sandbox: String,
    /// QEMU's end of the guest's console, to be logged
    #[arg(long, value_name = "SOCKET")]
    pub agent_logs_socket: Option<String>,
    /// Log all there is
    #[arg(long)]
    pub debug: bool,
}

#[derive(Debug, Subcommand)]
pub enum Template {
    /// Boot a VM and keep its state, unless there is a template that fits
    Create(Json),
    /// Make the place in memory where it will be, when the pool is to have one (the unit
    /// does, in the host's own mount namespace)
    #[command(hide = true)]
    Place,
    /// Show the template; exit code 1 when there is none that fits
    Status(Json),
    /// Remove it; clones that run are not affected
    Destroy(Json),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("16G"), Ok(16 << 30));
        assert_eq!(size("3k"), Ok(3 << 10));
        assert_eq!(size("77"), Ok(77));
        for text in ["", "G", "-1", "1.5G", "1 G", "+1", "18446744073709551615T", "1Gé"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        let (first, last) = (*real_time().start(), *real_time().end());
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("term", 15),
            ("sigkill", 9),
            ("9", 9),
            ("STOP", 19),
            ("cld", 17),
            ("RTMIN", first),
            ("SIGRTMIN+3", first + 3),
            ("RTMAX-1", last - 1),
            ("64", 64),
        ] {
            assert_eq!(signal(text), Ok(number), "{text}");
        }
        for text in ["", "SIG", "0", "65", "-9", "TERMX", "RTMIN-1", "RTMAX+1", "RTMINx", "é"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn seconds_have_a_range() {
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(seconds("31536000"), Ok(Duration::from_secs(31_536_000)));
        for text in
            ["", "-1", "+1", "1e3", "inf", "nan", "31536001", "18446744073709551615", "1 ", "."]
        {
            assert!(seconds(text).is_err() && some_seconds(text).is_err(), "{text}");
        }
        assert!(some_seconds("0").is_err() && some_seconds("0.0001").is_err());
        assert_eq!(some_seconds("0.001"), Ok(Duration::from_millis(1)));
    }

    #[test]
    fn a_command_keeps_its_own_options() {
        let cli = Cli::parse_from(["vmcache", "run", "--cold", "--", "ls", "--json", "-l"]);
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.process.command, ["ls", "--json", "-l"]);
    }
}
