#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace circlet {

// Each adds its command to `app`; when the command line picks it, `command` becomes what runs it and gives the exit code.
void AddQuantize(CLI::App& app, std::function<int()>& command);
void AddEvaluate(CLI::App& app, std::function<int()>& command);
void AddVerify(CLI::App& app, std::function<int()>& command);
void AddMakeCheckpoint(CLI::App& app, std::function<int()>& command);
void AddShow(CLI::App& app, std::function<int()>& command);
void AddChat(CLI::App& app, std::function<int()>& command);
void AddTokenize(CLI::App& app, std::function<int()>& command);
void AddPreprocess(CLI::App& app, std::function<int()>& command);
void AddGenerate(CLI::App& app, std::function<int()>& command);
void AddRun(CLI::App& app, std::function<int()>& command);
void AddExample(CLI::App& app, std::function<int()>& command);
void AddInspect(CLI::App& app, std::function<int()>& command);       // smoke, trace and their common spelling
void AddMadeOfParser(CLI::App& app, std::function<int()>& command);  // man and completion

}  // namespace circlet
