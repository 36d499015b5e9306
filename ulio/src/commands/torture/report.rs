//! What is told at the end, on stdout.

use userland_io_testing::Report;
use userland_io_testing::check::Verdict;

use crate::cli::{Through, Torture};
use crate::errors::Failure;
use crate::output::{Results, printable};

/// What a run was about.
pub(super) struct Told<'a> {
    pub(super) arguments: &'a Torture,
    /// The stack's words, or the URI.
    pub(super) name: String,
    /// A real executor: chance decides whether a script fails again.
    pub(super) live: bool,
    /// A simulated disk is below.
    pub(super) simulated: bool,
}

/// The runs in a line.
pub(super) fn line(report: &Report) -> String {
    let seconds = report.took.as_secs_f64().max(1e-9);
    let runs = report.runs as f64 / seconds;
    let mut text = format!(
        "{} runs in {seconds:.1} s ({runs:.0} a second)",
        report.runs
    );
    if report.crashes > 0 {
        let rate = report.rate();
        text.push_str(&format!(
            ", {} crashes ({rate:.0} a second)",
            report.crashes
        ));
    }
    text
}

impl Told<'_> {
    /// Nothing was found.
    pub(super) fn well(&self, report: &Report) -> Result<(), Failure> {
        let mut results = Results::begin();
        results.line(format_args!("{}: no promise was broken", self.name))?;
        results.line(line(report))?;
        results.end()
    }

    /// It was told to stop.
    pub(super) fn interrupted(&self, report: &Report) -> Result<(), Failure> {
        self.well(report)?;
        Err(Failure::Failed("interrupted before it was done".to_owned()))
    }

    /// A check of the suite failed.
    pub(super) fn suite(&self, verdict: &Verdict) -> Failure {
        self.tell(&format!("{}: {verdict}\n", self.name))
    }

    /// A script failed.
    pub(super) fn failed(&self, failure: &userland_io_testing::Failure) -> Failure {
        let name = &self.name;
        let (script, seed) = (failure.script.to_string(), failure.found.seed);
        let mut text = format!("{name}: {}\n", failure.verdict);
        text.push_str(&format!(
            "Found with seed {seed}, after {}.\n",
            line(&failure.before)
        ));
        if failure.script.rounds.is_empty() {
            return self.tell(&text);
        }
        text.push_str(match self.live {
            true => "The smallest script that showed it; here chance has its part, so a replay may need many runs:",
            false => "The smallest script that shows it:",
        });
        text.push_str(&format!("\n\n    {script}\n\nAs a test:\n\n"));
        text.push_str(&self.test(&script, seed));
        text.push_str(&format!(
            "\nAs a command:\n\n    {}\n",
            self.command(&script)
        ));
        self.tell(&text)
    }

    fn tell(&self, text: &str) -> Failure {
        let mut results = Results::begin();
        let told = results
            .line(printable(text.trim_end()))
            .and_then(|()| results.end());
        match told {
            Err(failure) => failure,
            Ok(()) => Failure::Failed(format!("{} broke a promise", self.name)),
        }
    }

    fn test(&self, script: &str, seed: u64) -> String {
        let claim = match self.arguments.claim {
            None => "None".to_owned(),
            Some(claim) => {
                let level = userland_io::CrashLevel::from(claim);
                format!("Some(userland_io::CrashLevel::{level:?})")
            }
        };
        let name = format!("{:?}", self.name);
        let Torture {
            clients,
            connections,
            ..
        } = self.arguments;
        let clients = format!(
            "userland_io_testing::nbd::Clients {{ count: {clients}, connections: {connections} }}"
        );
        let words = format!(
            "    let registry = userland_io::stack::Registry::builtin();\n    \
             let plan = registry.parse({name}).unwrap();\n    \
             let simulation = userland_io_testing::stack::simulate(&registry, &plan).unwrap();\n"
        );
        if !self.live {
            return format!(
                "#[test]\nfn seed_{seed}() {{\n{words}    \
                 let subject = simulation.subject({claim});\n    \
                 userland_io_testing::torture::replay(&subject, \"{script}\").unwrap();\n}}\n"
            );
        }
        let way = format!("userland_io_testing::nbd::through_nbd(engine, {clients})");
        let subject = match (&self.arguments.uri, self.arguments.through) {
            (Some(_), _) => format!(
                "    let subject = userland_io_testing::Subject::over({name}, vec![], |_| {{\n        \
                 userland_io_testing::nbd::connect({name}, {clients})\n    }});\n"
            ),
            (None, Some(Through::Nbd)) if self.simulated => {
                format!(
                    "{words}    let subject = simulation.subject_over({claim}, |engine| {way});\n"
                )
            }
            (None, through) => {
                let fronts = match through {
                    Some(Through::Nbd) => format!("{way}.await"),
                    None => "Ok(vec![userland_io_testing::live::through_device(engine).await?])"
                        .to_owned(),
                };
                format!(
                    "    let subject = userland_io_testing::Subject::over({name}, vec![], |_| async {{\n        \
                     let engine = userland_io::stack::Registry::builtin().open({name}).await.unwrap();\n        \
                     {fronts}\n    }});\n"
                )
            }
        };
        let ends = match self.arguments.clients {
            1 => "",
            _ => "    let subject = subject.ends_on_errors();\n",
        };
        format!(
            "#[tokio::test(flavor = \"multi_thread\")]\nasync fn seed_{seed}() {{\n    \
             use userland_io_testing::live::{{Live, Tokio}};\n{subject}{ends}    \
             let script = \"{script}\".parse().unwrap();\n    \
             Live::new(&subject, &Tokio).replay(&script, 1000).await.unwrap();\n}}\n"
        )
    }

    fn command(&self, script: &str) -> String {
        let arguments = self.arguments;
        let mut text = "ulio torture".to_owned();
        if let Some(claim) = arguments.claim {
            text.push_str(&format!(" --claim {}", format!("{claim:?}").to_lowercase()));
        }
        if arguments.through.is_some() {
            text.push_str(" --through nbd");
        }
        for (flag, number) in [
            ("clients", arguments.clients),
            ("connections", arguments.connections),
        ] {
            if number > 1 {
                text.push_str(&format!(" --{flag} {number}"));
            }
        }
        for (given, flag) in [
            (arguments.real, " --real"),
            (arguments.overwrite, " --overwrite"),
        ] {
            if given {
                text.push_str(flag);
            }
        }
        text.push_str(&format!(" --script '{script}'"));
        match &arguments.uri {
            Some(uri) => text.push_str(&format!(" --uri {}", quoted(uri))),
            None => {
                for word in &arguments.stack {
                    text.push_str(&format!(" {}", quoted(word)));
                }
            }
        }
        text
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=%+@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}
